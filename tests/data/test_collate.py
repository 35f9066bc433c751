from random import Random

import pytest
import torch
from PIL import Image

from owl2.constants import IGNORE_INDEX
from owl2.data.augment import AUGMENTATIONS
from owl2.data.collate import Collator, collate, encode_sample
from owl2.data.mixture import MixtureDataset, MixtureSource, SampleIndex
from owl2.data.packing import pack
from owl2.data.sample import InvalidSample, RowDataset, Sample
from owl2.errors import ErrorCode, InputError
from tests.errors import raises_input_error

IMAGE_TOKENS = 5  # as in conftest.py
LONG = "what color is the circle? " * 30


def sample(question: str, answer: str, *images, source: str = "here") -> Sample:
    content = [{"type": "image", "path": str(path)} for path in images]
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Sample(messages, source)


@pytest.fixture
def samples(image) -> list[Sample]:
    return [
        sample("what color is the circle?", "red", image, source="one"),
        sample("yes or no?", "a blue rectangle.", source="two"),
        sample("same?", "no", image, image, source="three"),
    ]


def encode(samples, processor, augment="none", seed=0, max_length=None) -> list:
    augmentation = AUGMENTATIONS[augment]
    return [encode_sample(s, processor, max_length, augmentation, Random(seed)) for s in samples]


# ------------------------------------------------------------------ samples to features


def test_without_augmentation_the_features_are_those_of_the_processor(samples, processor):
    for given, features in zip(samples, encode(samples, processor), strict=True):
        expected = processor.for_training(given.messages)
        assert features.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(features[key], tensor)


def test_augmentation_changes_pixels_only(samples, processor):
    plain = encode(samples, processor)
    differing = 0
    for seed in range(4):
        for before, after in zip(plain, encode(samples, processor, "dihedral", seed), strict=True):
            assert before.keys() == after.keys()
            for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
                assert torch.equal(before[key], after[key])
            if "pixel_values" in before:
                differing += not torch.equal(before["pixel_values"], after["pixel_values"])
    assert differing >= 4


def test_augmented_images_keep_their_order(tmp_path, processor):
    paths = []
    for name in ("red", "blue"):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (8, 8), name).save(paths[-1])
    given = [sample("same?", "no", *paths)]
    (plain,), (augmented,) = (encode(given, processor, name) for name in ("none", "crop_flip"))
    assert torch.allclose(plain["pixel_values"], augmented["pixel_values"], atol=1e-6)
    assert not torch.allclose(plain["pixel_values"][0], plain["pixel_values"][1])


def test_augmentation_depends_on_seed_epoch_source_and_draw(image, processor):
    def pixels(seed: int, epoch: int, source: int, draw: int) -> torch.Tensor:
        sources = [MixtureSource([sample("?", "yes", image)], 9)] * 2
        dataset = MixtureDataset(sources, processor, augment="crop_flip", seed=seed)
        return dataset[SampleIndex(source, epoch, draw, row=0)]["pixel_values"]

    first = pixels(0, 0, 0, 0)
    assert torch.equal(first, pixels(0, 0, 0, 0))
    for other in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        assert not torch.equal(first, pixels(*other))


def test_augmentation_does_not_change_the_sample(samples, processor):
    before = repr(samples)
    encode(samples, processor, "crop_flip")
    assert repr(samples) == before


# ------------------------------------------------------------------ invalid samples


@pytest.mark.parametrize("augment", ["none", "dihedral"])
@pytest.mark.parametrize(
    ("content", "code"),
    [(None, ErrorCode.MISSING_IMAGE), (b"not an image", ErrorCode.BROKEN_IMAGE)],
)
def test_an_unreadable_image_makes_the_sample_invalid(tmp_path, processor, augment, content, code):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    (invalid,) = encode([sample("?", "!", path, source="chat.json:7")], processor, augment)
    assert (invalid.source, invalid.code) == ("chat.json:7", code)
    assert "broken.png" in invalid.reason
    assert "chat.json" not in invalid.reason


def test_max_pixels_applies_before_augmentation(samples, processor):
    processor.image_processor.max_pixels = 50
    invalid = encode_sample(
        samples[0], processor, None, lambda image, rng: image.crop((0, 0, 1, 1)), Random(0)
    )
    assert (invalid.source, invalid.code) == ("one", ErrorCode.IMAGE_TOO_LARGE)


def test_a_sample_truncated_to_no_label_is_invalid(processor):
    (invalid,) = encode([sample(LONG, "red", source="chat.json:3")], processor, max_length=60)
    assert (invalid.source, invalid.code) == ("chat.json:3", ErrorCode.NO_LABELS)
    assert "60" in invalid.reason


def test_a_truncated_answer_is_valid(processor):
    (features,) = encode([sample("what?", LONG)], processor, max_length=60)
    assert features["input_ids"].shape == (1, 60)


def test_an_invalid_row_is_an_invalid_sample(processor):
    class InvalidRows(RowDataset):
        def __len__(self):
            return 1

        def source(self, index):
            return "chat.json, row 7"

        def read(self, index):
            raise InputError("chat.json, row 7: not a list", ErrorCode.INVALID_FORMAT)

    dataset = MixtureDataset([MixtureSource(InvalidRows())], processor)
    invalid = dataset[SampleIndex(0, 0, 0, row=0)]
    assert invalid == InvalidSample("chat.json, row 7", "not a list", ErrorCode.INVALID_FORMAT)


def test_samples_of_streams_are_encoded(samples, processor):
    dataset = MixtureDataset([MixtureSource(samples)], processor)
    invalid = InvalidSample("000.tar, 7", "no image")
    assert dataset[SampleIndex(0, 0, 0, None, invalid)] is invalid
    (expected,) = encode(samples[1:2], processor)
    streamed = dataset[SampleIndex(0, 0, 5, None, samples[1])]
    assert torch.equal(streamed["input_ids"], expected["input_ids"])


def test_an_unknown_augmentation_is_refused(samples, processor):
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "dihedral"):
        MixtureDataset([MixtureSource(samples)], processor, augment="dihedrl")


# ------------------------------------------------------------------ features to batches


def test_a_batch_has_all_samples_and_padding(samples, processor):
    features = encode(samples, processor)
    batch = collate(features, pad_token_id=7)
    lengths = [item["input_ids"].shape[1] for item in features]
    assert len(set(lengths)) == 3
    fill = {"input_ids": 7, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORE_INDEX}
    for key, padding in fill.items():
        assert batch[key].shape == (3, max(lengths))
        for row, item, length in zip(batch[key], features, lengths, strict=True):
            assert torch.equal(row[:length], item[key][0])
            assert bool((row[length:] == padding).all())
    pixels = [item["pixel_values"] for item in features if "pixel_values" in item]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    assert batch["pixel_values"].shape[0] * IMAGE_TOKENS == int(batch["mm_token_type_ids"].sum())
    assert batch.keys() == fill.keys() | {"pixel_values"}


def test_labels_decode_to_the_answers(samples, processor):
    batch = collate(encode(samples, processor), pad_token_id=0)
    answers = [processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    assert answers == ["red</s>", "a blue rectangle.</s>", "no</s>"]


def test_a_text_only_batch_has_no_pixel_values(samples, processor):
    assert "pixel_values" not in collate(encode(samples[1:2], processor), pad_token_id=0)


@pytest.mark.parametrize("layout", ["padded", "packed", "one row"])
def test_invalid_samples_are_skipped_and_reported(samples, processor, layout):
    features = encode(samples, processor)
    invalid = [InvalidSample("chat.json:3", "one"), InvalidSample("chat.json:4", "two")]
    batch = Collator(processor, layout)([invalid[0], *features, invalid[1]])
    expected = (
        collate(features, 0) if layout == "padded" else pack(features, 0, layout == "one row")
    )
    assert batch.inputs.keys() == expected.keys()
    assert all(torch.equal(batch.inputs[key], expected[key]) for key in expected)
    assert batch.skipped == invalid
    tokens = sum(item["input_ids"].shape[1] for item in features)
    assert (batch.num_samples, batch.num_tokens, batch.num_images) == (3, tokens, 3)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_without_valid_samples_has_an_image_but_no_label(processor, layout):
    invalid = [InvalidSample("chat.json:3", "reason")]
    inputs, *counts = Collator(processor, layout)(invalid)
    assert counts == [0, 0, 0, invalid]
    assert bool((inputs["labels"] == IGNORE_INDEX).all())
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)
    assert int(inputs["mm_token_type_ids"].sum()) == IMAGE_TOKENS
