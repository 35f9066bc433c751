"""Labels of scoring models: features, and the order of pairs."""

from itertools import islice

import pytest
import torch

from owl2.data.collate import Collator, encode_sample
from owl2.data.dataloader import MixtureBatchSampler
from owl2.data.mixture import MixtureDataset, MixtureSource
from owl2.data.row_parsers import parse_row
from owl2.data.sample import InvalidSample, OpinionLabel, Sample
from owl2.data.score_labels import ScoreLabels
from owl2.errors import ErrorCode
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer
from tests.data.streams import NumberedStream
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY, read

PREFIX = "The quality of the image is"
OPINION = OpinionLabel((0, 1, 0, 0, 0), 81, 3)  # integers, as in JSON


@pytest.fixture(scope="module")
def processor():
    return Owl2Processor.from_pretrained(FAMILY / "deqa_score" / "model", chat_template="v1")


@pytest.fixture(scope="module")
def score_labels(processor):
    return ScoreLabels.from_processor(processor, PREFIX)


def scored(answer, number=0, opinion=OPINION, is_description=False):
    messages = [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": answer},
    ]
    return Sample(messages, f"row {number}", (), opinion, is_description)


@pytest.mark.parametrize("template", ["v1", "mplug_owl2"])
def test_ids_are_those_of_the_authors(template):
    golden = read("deqa_score", "text.json")
    path = FAMILY / "deqa_score" / "model"
    found = ScoreLabels.from_processor(
        Owl2Processor.from_pretrained(path, chat_template=template), PREFIX
    )
    assert list(found.prefix_ids) == golden["level_prefix_ids"]
    assert list(found.level_ids) == golden["level_ids"]


def test_tokenizer_without_the_levels_is_refused(tokenizer_file):
    processor = Owl2Processor(Owl2ImageProcessor(size=8), Owl2Tokenizer(tokenizer_file))
    with raises_input_error(ErrorCode.UNSUPPORTED, "excellent"):
        ScoreLabels.from_processor(processor, PREFIX)


def test_features_of_a_scored_sample(processor, score_labels):
    sample = scored(f"{PREFIX} fair. It is blurred.")
    features = encode_sample(sample, processor, score_labels=score_labels)
    [position] = features["level_positions"].tolist()
    assert features["input_ids"][0, position] == score_labels.level_ids[2]
    assert features["level_probs"].tolist() == [[0, 1, 0, 0, 0]]
    assert (features["gt_scores"].tolist(), features["stds"].tolist()) == ([81], [3])
    assert all(features[k].dtype == torch.float32 for k in ("level_probs", "gt_scores", "stds"))
    plain = encode_sample(sample, processor)
    assert features.keys() - plain.keys() == {"level_positions", "level_probs", "gt_scores", "stds"}


@pytest.mark.parametrize(
    ("sample", "max_length", "code"),
    [
        (scored("It is good."), None, ErrorCode.NO_LABELS),
        (scored(f"{PREFIX} good."), -4, ErrorCode.NO_LABELS),  # before the level word
        (scored(f"{PREFIX} good.", opinion=None), None, ErrorCode.MISSING_VALUE),
    ],
)
def test_samples_that_are_not_scored(processor, score_labels, sample, max_length, code):
    if max_length is not None:
        max_length += len(processor.for_training(sample.messages)["input_ids"][0])
    found = encode_sample(sample, processor, max_length, score_labels=score_labels)
    assert isinstance(found, InvalidSample) and found.code is code


def test_description_needs_no_opinion(processor, score_labels):
    sample = scored("It is good.", opinion=None, is_description=True)
    features = encode_sample(sample, processor, score_labels=score_labels)
    assert "level_probs" not in features


# ------------------------------------------------------------------ rows


TURNS = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "good"}]
ROW = {"conversations": TURNS, "level_probs": [0, 0, 1.0, 0, 0], "gt_score": 3, "std": 0.5}


def test_rows_of_the_authors_are_read():
    sample = parse_row(ROW | {"id": "a->3", "gt_score_norm": 2}, "row", None)
    assert sample.opinion == OpinionLabel((0, 0, 1.0, 0, 0), 3, 0.5)
    assert sample.unused_keys == ("id",)
    assert not sample.is_description
    # Q-Align's rows have a score, but no probabilities.
    plain = parse_row({"conversations": TURNS, "gt_score": 3}, "row", None)
    assert plain.opinion is None
    assert parse_row(ROW | {"task_type": "description"}, "row", None).is_description


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"level_probs": [1, 0]}, ErrorCode.INVALID_TYPE),
        ({"level_probs": "12345"}, ErrorCode.INVALID_TYPE),
        ({"gt_score": None}, ErrorCode.INVALID_TYPE),
        ({"std": "1"}, ErrorCode.INVALID_TYPE),
        ({"std": -1}, ErrorCode.INVALID_VALUE),
        ({"level_probs": [0, -0.1, 1.1, 0, 0]}, ErrorCode.INVALID_VALUE),
    ],
)
def test_invalid_opinions(changes, code):
    with raises_input_error(code, "row 7"):
        parse_row(ROW | changes, "row 7", None)


# ------------------------------------------------------------------ pairs


def pair_sampler(rank=0, world_size=1, sizes=(5, 2), batch_size=4, **options):
    sources = [MixtureSource([scored(PREFIX, number) for number in range(size)]) for size in sizes]
    dataset = MixtureDataset(sources, None, seed=3)
    kwargs = {"rank": rank, "world_size": world_size, "pairs": True} | options
    return MixtureBatchSampler(dataset, batch_size, **kwargs)


def test_partners_are_other_rows_of_the_same_source():
    seen = {}
    for batch in islice(pair_sampler(), 200):
        assert len(batch) == 8
        for first, second in zip(batch[:4], batch[4:], strict=True):
            assert (first.source, first.is_partner, second.is_partner) == (
                second.source,
                False,
                True,
            )
            seen.setdefault((first.source, first.row), set()).add(second.row)
    assert seen == {
        **{(0, row): {*range(5)} - {row} for row in range(5)},
        (1, 0): {1},
        (1, 1): {0},
    }


@pytest.mark.parametrize("image_tokens", [None, 5])
def test_first_samples_keep_their_order(image_tokens):
    pairs = islice(pair_sampler(image_tokens=image_tokens), 20)
    plain = islice(pair_sampler(image_tokens=image_tokens, pairs=False), 20)
    assert [batch[:4] for batch in pairs] == list(plain)


def test_pairs_of_all_processes_are_those_of_one():
    together = list(islice(pair_sampler(), 10))
    shares = [list(islice(pair_sampler(rank, 2, batch_size=2), 10)) for rank in range(2)]
    for number, batch in enumerate(together):
        pairs = {*zip(batch[:4], batch[4:], strict=True)}
        shared = {
            pair
            for share in shares
            for pair in zip(share[number][:2], share[number][2:], strict=True)
        }
        assert shared == pairs


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_pairs_resume_after_any_batch(stop):
    sampler = pair_sampler()
    batches = list(islice(sampler, 6))
    resumed = pair_sampler()
    resumed.state = sampler.states[stop - 1]
    assert list(islice(resumed, 6 - stop)) == batches[stop:]


def test_sources_without_pairs_are_refused():
    stream = MixtureDataset([MixtureSource(NumberedStream("s"), 30)], None)
    for sampler in (pair_sampler(sizes=[1]), MixtureBatchSampler(stream, 2, pairs=True)):
        with raises_input_error(ErrorCode.UNSUPPORTED, "source 0"):
            next(iter(sampler))


def test_pairs_with_an_invalid_sample_are_removed(processor, score_labels):
    def encode(number, **options):
        sample = scored(f"{PREFIX} good.", number, **options)
        return encode_sample(sample, processor, score_labels=score_labels)

    bad = InvalidSample("row", "broken", ErrorCode.BROKEN_IMAGE)
    words = encode(9, is_description=True)
    firsts = [encode(0), words, encode(1), bad, encode(2), encode(3)]
    seconds = [encode(4), bad, bad, encode(5), encode(6), words]
    batch = Collator(processor, pairs=True)([*firsts, *seconds])
    expected = [firsts[0], firsts[4], seconds[0], seconds[4], words]
    for row, item in zip(batch.inputs["input_ids"], expected, strict=True):
        assert torch.equal(row[: item["input_ids"].shape[1]], item["input_ids"][0])
    assert batch.inputs["level_probs"].shape == (4, 5)
    assert (batch.num_samples, len(batch.skipped)) == (3, 4)
    assert batch.skipped[-1].code is ErrorCode.CONFLICT


def test_scored_samples_precede_descriptions(processor, score_labels):
    samples = [
        scored("It is good.", 0, is_description=True),
        scored(f"{PREFIX} good.", 1),
        scored("It is bad.", 2, is_description=True),
        scored(f"{PREFIX} bad.", 3),
    ]
    items = [encode_sample(one, processor, score_labels=score_labels) for one in samples]
    inputs = Collator(processor)(items).inputs
    lengths = inputs["attention_mask"].sum(1)
    for row, length, number in zip(inputs["input_ids"], lengths, (1, 3, 0, 2), strict=True):
        assert torch.equal(row[:length], items[number]["input_ids"][0])
    assert inputs["level_positions"].shape == (2,)
