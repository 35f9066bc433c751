import logging
from collections import Counter

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from owl2.data.collate import Collator, TrainingSet, collate
from owl2.data.mixture import Mixture, Source
from owl2.data.sample import Sample
from owl2.errors import InputError
from owl2.processing.processor import IGNORED

PLACES = 5  # of a picture, as in conftest.py


def sample(question: str, answer: str, *pictures, source: str = "here") -> Sample:
    content = [{"type": "image", "path": str(path)} for path in pictures]
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Sample(messages, source)


def training_set(samples, processor, **options) -> TrainingSet:
    return TrainingSet(Mixture([Source(samples)]), processor, **options)


@pytest.fixture
def samples(picture) -> list[Sample]:
    return [
        sample("what color is the circle?", "red", picture, source="one"),
        sample("yes or no?", "a blue rectangle.", source="two"),
        sample("same?", "no", picture, picture, source="three"),
    ]


def features_of(samples, processor, **options) -> list[dict]:
    made = training_set(samples, processor, **options)
    return [made[index] for index in range(len(made))]


# ------------------------------------------------------------------ samples → features


def test_without_augmentation_features_are_the_processors(samples, processor):
    for given, features in zip(samples, features_of(samples, processor), strict=True):
        expected = processor.for_training(given.messages)
        assert features.pop("source") == given.source
        assert features.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(features[key], tensor)


def test_augmentation_changes_pixels_only(samples, processor):
    plain = features_of(samples, processor)
    changed = training_set(samples, processor, augment="dihedral", seed=1)
    differing = 0
    for epoch in range(4):
        changed.set_epoch(epoch)
        for before, after in zip(plain, (changed[i] for i in range(3)), strict=True):
            assert before.keys() == after.keys()
            for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
                assert torch.equal(before[key], after[key])
            if "pixel_values" in before:
                differing += not torch.equal(before["pixel_values"], after["pixel_values"])
    assert differing >= 4


def test_augmented_pictures_stay_in_order(tmp_path, processor):
    paths = []
    for name in ("red", "blue"):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (8, 8), name).save(paths[-1])
    given = [sample("same?", "no", *paths)]
    (plain,), (changed,) = (features_of(given, processor, augment=a) for a in ("none", "crop_flip"))
    assert torch.allclose(plain["pixel_values"], changed["pixel_values"], atol=1e-6)
    assert not torch.allclose(plain["pixel_values"][0], plain["pixel_values"][1])


def test_augmentation_depends_on_seed_epoch_and_index_only(picture, processor):
    def pixels(seed: int, epoch: int, index: int) -> torch.Tensor:
        given = [sample(f"{number}?", "yes", picture) for number in range(8)]
        made = training_set(given, processor, augment="crop_flip", seed=seed)
        made.set_epoch(epoch)
        return made[index]["pixel_values"]

    first = pixels(0, 0, 0)
    assert torch.equal(first, pixels(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first, pixels(*other))


def test_samples_are_not_changed_by_augmentation(samples, processor):
    before = repr(samples)
    features_of(samples, processor, augment="crop_flip")
    assert repr(samples) == before


@pytest.mark.parametrize("augment", ["none", "dihedral"])
@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_a_picture_that_cannot_be_read_names_the_sample(tmp_path, processor, augment, content):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    made = training_set([sample("?", "!", path, source="talks.json:7")], processor, augment=augment)
    with pytest.raises(InputError, match=r"^talks\.json:7: .*broken\.png"):
        made[0]


def test_the_limit_on_pixels_holds_under_augmentation_too(samples, processor):
    processor.image_processor.max_pixels = 50
    made = training_set(samples, processor, augment="dihedral")
    # What comes out is small, so only the check before decoding can refuse the picture.
    made.augment = lambda picture, chance: picture.crop((0, 0, 1, 1))
    with pytest.raises(InputError, match=r"^one: .*pixels"):
        made[0]


def test_unknown_augmentation(samples, processor):
    with pytest.raises(InputError, match="Do you mean 'dihedral'"):
        training_set(samples, processor, augment="dihedrl")


# ------------------------------------------------------------------ features → batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_holds_every_sample_and_only_padding_besides(samples, processor, side):
    features = features_of(samples, processor)
    batch = collate(features, pad_token_id=7, side=side)
    lengths = [item["input_ids"].shape[1] for item in features]
    assert len(set(lengths)) == 3
    fill = {"input_ids": 7, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}
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
    answers = [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert answers == ["red</s>", "a blue rectangle.</s>", "no</s>"]


def test_a_batch_of_text_has_no_pixels(samples, processor):
    batch = collate(features_of(samples[1:2], processor), pad_token_id=0)
    assert "pixel_values" not in batch


# ------------------------------------------------------------------ samples without labels


LONG = "what color is the circle? " * 30


def test_a_sample_cut_to_no_label_is_left_out_and_counted(samples, processor, caplog):
    given = [*samples, sample(LONG, "red", source="talks.json:3")]
    features = features_of(given, processor, max_length=60)
    assert features[3]["input_ids"].shape == (1, 60)
    collator = Collator(0)
    with caplog.at_level(logging.WARNING):
        batch = collator(features)
    expected = collate(features[:3], 0)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert collator.left_out == 1
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == ["talks.json:3"]
    collator(features[:3])
    assert collator.left_out == 1


def test_a_batch_with_no_label_at_all_stays_a_batch(processor, picture):
    given = [sample(LONG, "red", picture), sample(LONG, "blue", picture)]
    collator = Collator(0)
    batch = collator(features_of(given, processor, max_length=60))
    assert collator.left_out == 2
    assert batch["input_ids"].shape == (1, 60)
    assert bool((batch["labels"] == IGNORED).all())
    assert batch["pixel_values"].shape[0] == 1


def test_a_sample_cut_in_its_answer_still_teaches(processor):
    given = [sample("what?", LONG)]
    collator = Collator(0)
    batch = collator(features_of(given, processor, max_length=60))
    assert (collator.left_out, batch["input_ids"].shape) == (0, (1, 60))
    assert bool((batch["labels"] != IGNORED).any())


# ------------------------------------------------------------------ workers


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_the_same_batches_and_count_together(picture, processor, workers):
    given = [sample(f"{number}?", "yes", picture) for number in range(12)]
    given += [sample(LONG, "yes") for _ in range(4)]
    made = TrainingSet(
        Mixture([Source(given), Source(given, 5)], seed=3),
        processor,
        augment="crop_flip",
        max_length=60,
        seed=3,
    )
    made.set_epoch(2)
    collator = Collator(0)
    batches = list(DataLoader(made, batch_size=4, num_workers=workers, collate_fn=collator))
    unlabelled = sum(bool((made[i]["labels"] == IGNORED).all()) for i in range(len(made)))
    assert collator.left_out == unlabelled >= 4
    rows = [row for batch in batches for row in batch.get("pixel_values", [])]
    pixels = [made[i]["pixel_values"][0] for i in range(len(made)) if "pixel_values" in made[i]]
    assert len(rows) == len(pixels)
    assert all(torch.equal(row, own) for row, own in zip(rows, pixels, strict=True))
    sizes = Counter(batch["input_ids"].shape[0] for batch in batches)
    assert sizes[4] >= 3
