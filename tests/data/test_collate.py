import pytest
import torch
from PIL import Image

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import Collator, TrainingSet, collate
from owl2.data.mixture import Mixture, MixtureSource, SampleIndex
from owl2.data.packing import pack
from owl2.data.sample import InvalidSample, Sample
from owl2.errors import ErrorCode, InputError

PLACES = 5  # of an image, as in conftest.py


def sample(question: str, answer: str, *images, source: str = "here") -> Sample:
    content = [{"type": "image", "path": str(path)} for path in images]
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Sample(messages, source)


def training_set(samples, processor, **options) -> TrainingSet:
    return TrainingSet(Mixture([MixtureSource(samples)]), processor, **options)


@pytest.fixture
def samples(image) -> list[Sample]:
    return [
        sample("what color is the circle?", "red", image, source="one"),
        sample("yes or no?", "a blue rectangle.", source="two"),
        sample("same?", "no", image, image, source="three"),
    ]


def features_of(samples, processor, epoch=0, **options) -> list[dict]:
    """Of each of the samples, in their own order."""
    return [
        made[SampleIndex(0, epoch, 0)]
        for made in (training_set([given], processor, **options) for given in samples)
    ]


# ------------------------------------------------------------------ samples → features


def test_without_augmentation_features_are_the_processors(samples, processor):
    for given, features in zip(samples, features_of(samples, processor), strict=True):
        expected = processor.for_training(given.messages)
        assert features.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(features[key], tensor)


def test_augmentation_changes_pixels_only(samples, processor):
    plain = features_of(samples, processor)
    differing = 0
    for epoch in range(4):
        changed = features_of(samples, processor, epoch, augment="dihedral", seed=1)
        for before, after in zip(plain, changed, strict=True):
            assert before.keys() == after.keys()
            for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
                assert torch.equal(before[key], after[key])
            if "pixel_values" in before:
                differing += not torch.equal(before["pixel_values"], after["pixel_values"])
    assert differing >= 4


def test_augmented_images_stay_in_order(tmp_path, processor):
    paths = []
    for name in ("red", "blue"):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (8, 8), name).save(paths[-1])
    given = [sample("same?", "no", *paths)]
    (plain,), (changed,) = (features_of(given, processor, augment=a) for a in ("none", "crop_flip"))
    assert torch.allclose(plain["pixel_values"], changed["pixel_values"], atol=1e-6)
    assert not torch.allclose(plain["pixel_values"][0], plain["pixel_values"][1])


def test_augmentation_depends_on_seed_epoch_and_draw_only(image, processor):
    def pixels(seed: int, draw: SampleIndex) -> torch.Tensor:
        given = [sample("?", "yes", image)]
        made = TrainingSet(
            Mixture([MixtureSource(given, 9)] * 2), processor, augment="crop_flip", seed=seed
        )
        return made[draw]["pixel_values"]

    first = pixels(0, SampleIndex(0, 0, 0))
    assert torch.equal(first, pixels(0, SampleIndex(0, 0, 0)))
    others = (
        (1, SampleIndex(0, 0, 0)),
        (0, SampleIndex(1, 0, 0)),
        (0, SampleIndex(0, 1, 0)),
        (0, SampleIndex(0, 0, 1)),
    )
    for seed, draw in others:
        assert not torch.equal(first, pixels(seed, draw))


def test_samples_are_not_changed_by_augmentation(samples, processor):
    before = repr(samples)
    features_of(samples, processor, augment="crop_flip")
    assert repr(samples) == before


# ------------------------------------------------------------------ what cannot be used


@pytest.mark.parametrize("augment", ["none", "dihedral"])
@pytest.mark.parametrize(
    ("content", "code"),
    [(None, ErrorCode.MISSING_IMAGE), (b"not an image", ErrorCode.BROKEN_IMAGE)],
)
def test_a_image_that_cannot_be_read(tmp_path, processor, augment, content, code):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    given = [sample("?", "!", path, source="talks.json:7")]
    (bad,) = features_of(given, processor, augment=augment)
    assert (bad.source, bad.code) == ("talks.json:7", code)
    assert "broken.png" in bad.reason
    assert "talks.json" not in bad.reason


def test_the_limit_on_pixels_holds_under_augmentation_too(samples, processor):
    processor.image_processor.max_pixels = 50
    made = training_set(samples[:1], processor, augment="dihedral")
    # What comes out is small, so only the check before decoding can refuse the image.
    made.augment = lambda image, chance: image.crop((0, 0, 1, 1))
    bad = made[SampleIndex(0, 0, 0)]
    assert (bad.source, bad.code) == ("one", ErrorCode.IMAGE_TOO_LARGE)


def test_a_sample_cut_to_no_label(processor):
    given = [sample(LONG, "red", source="talks.json:3")]
    (bad,) = features_of(given, processor, max_length=60)
    assert (bad.source, bad.code) == ("talks.json:3", ErrorCode.NO_LABELS)
    assert "60 tokens" in bad.reason


def test_a_sample_cut_in_its_answer_still_teaches(processor):
    (features,) = features_of([sample("what?", LONG)], processor, max_length=60)
    assert features["input_ids"].shape == (1, 60)


def test_a_row_that_is_no_sample(processor):
    class Rows(list):
        def __getitem__(self, place):
            raise InputError("talks.json, row 7: not a list", code="format")

    (bad,) = [TrainingSet(Mixture([MixtureSource(Rows([0]))]), processor)[SampleIndex(0, 0, 0)]]
    assert bad == InvalidSample("talks.json, row 7", "not a list", "format")


def test_what_a_stream_gives_is_taken_as_it_is(samples, processor):
    made = training_set(samples, processor)
    bad = InvalidSample("000.tar, 7", "no image")
    assert made[SampleIndex(0, 0, 0, bad)] is bad
    (expected,) = features_of(samples[1:2], processor)
    streamed = made[SampleIndex(0, 0, 5, samples[1])]
    assert torch.equal(streamed["input_ids"], expected["input_ids"])


def test_unknown_augmentation(samples, processor):
    with pytest.raises(InputError, match="Do you mean 'dihedral'"):
        training_set(samples, processor, augment="dihedrl")


LONG = "what color is the circle? " * 30


# ------------------------------------------------------------------ features → batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_holds_every_sample_and_only_padding_besides(samples, processor, side):
    features = features_of(samples, processor)
    batch = collate(features, pad_token_id=7, side=side)
    lengths = [item["input_ids"].shape[1] for item in features]
    assert len(set(lengths)) == 3
    fill = {"input_ids": 7, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORE_INDEX}
    for key, padding in fill.items():
        assert batch[key].shape == (3, max(lengths))
        for row, item, length in zip(batch[key], features, lengths, strict=True):
            real = row[:length] if side == "right" else row[-length:]
            rest = row[length:] if side == "right" else row[:-length]
            assert torch.equal(real, item[key][0])
            assert bool((rest == padding).all())
    pixels = [item["pixel_values"] for item in features if "pixel_values" in item]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    assert batch["pixel_values"].shape[0] * PLACES == int(batch["mm_token_type_ids"].sum())
    assert batch.keys() == fill.keys() | {"pixel_values"}


def test_labels_decode_to_exactly_the_answers(samples, processor):
    batch = collate(features_of(samples, processor), pad_token_id=0)
    answers = [processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    assert answers == ["red</s>", "a blue rectangle.</s>", "no</s>"]


def test_a_batch_of_text_has_no_pixels(samples, processor):
    batch = collate(features_of(samples[1:2], processor), pad_token_id=0)
    assert "pixel_values" not in batch


# ------------------------------------------------------------------ what a batch says of itself


@pytest.mark.parametrize("layout", ["padded", "packed", "one row"])
def test_bad_samples_are_left_out_and_told(samples, processor, layout):
    features = features_of(samples, processor)
    bad = [InvalidSample("talks.json:3", "why"), InvalidSample("talks.json:4", "why not")]
    collated = Collator(processor, layout)([bad[0], *features, bad[1]])
    expected = (
        collate(features, 0) if layout == "padded" else pack(features, 0, layout == "one row")
    )
    assert collated.batch.keys() == expected.keys()
    assert all(torch.equal(collated.batch[key], expected[key]) for key in expected)
    assert collated.left_out == bad
    tokens = sum(item["input_ids"].shape[1] for item in features)
    assert (collated.samples, collated.tokens, collated.images) == (3, tokens, 3)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_of_nothing_has_no_label_but_passes_through_all_of_the_model(processor, layout):
    bad = [InvalidSample("talks.json:3", "why")]
    batch, *counts = Collator(processor, layout)(bad)
    assert counts == [0, 0, 0, bad]
    assert bool((batch["labels"] == IGNORE_INDEX).all())
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert int(batch["mm_token_type_ids"].sum()) == PLACES
