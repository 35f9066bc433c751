import math
from random import Random

import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from owl2.constants import IGNORE_INDEX
from owl2.data.packing import first_fit_decreasing, pack


def features(length: int, images: int = 0, answer: int = 2) -> dict:
    """`length` tokens: two per image, text, and `answer` tokens with a label at the end."""
    ids = torch.arange(100 * length, 101 * length)[None]
    types = torch.zeros_like(ids)
    types[0, : 2 * images] = 1
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, length - answer :] = ids[0, length - answer :]
    item = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    item |= {"mm_token_type_ids": types, "labels": labels}
    if images:
        item["pixel_values"] = torch.full((images, 3, 2, 2), float(length))
    return item


def test_first_fit_decreasing():
    assert first_fit_decreasing([5, 3, 4, 2], 8) == [[0, 1], [2, 3]]
    assert first_fit_decreasing([3, 3, 3], 5) == [[0], [1], [2]]
    assert first_fit_decreasing([9, 1], 5) == [[0], [1]]
    assert first_fit_decreasing([4, 1, 7], math.inf) == [[2, 0, 1]]


def test_packing_is_complete_and_nearly_optimal():
    for seed in range(50):
        rng = Random(seed)
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        rows = first_fit_decreasing(lengths, 60)
        assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
        filled = [sum(lengths[place] for place in row) for row in rows]
        assert max(filled) <= 60
        assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / 60) + 1


@pytest.mark.parametrize("one_row", [False, True])
def test_every_sample_is_complete_and_separate(one_row):
    items = [features(5, 1), features(3), features(4, 1), features(2, 1, answer=0), features(8, 2)]
    batch = pack(items, 7, one_row)
    sequences = find_packed_sequence_indices(batch["position_ids"])
    assert batch["input_ids"].shape == ((1, 22) if one_row else (3, 8))
    found = []
    for row in range(len(batch["input_ids"])):
        for number in sequences[row].unique():
            here = sequences[row] == number
            found.append({key: batch[key][row][here] for key in batch if key != "pixel_values"})
    for item in items:
        (segment,) = [p for p in found if torch.equal(p["input_ids"], item["input_ids"][0])]
        found = [p for p in found if p is not segment]
        assert torch.equal(segment["mm_token_type_ids"], item["mm_token_type_ids"][0])
        assert torch.equal(segment["labels"], item["labels"][0])
        assert torch.equal(segment["position_ids"], torch.arange(len(segment["input_ids"])))
    for padding in found:
        assert bool((padding["input_ids"] == 7).all())
        assert bool((padding["labels"] == IGNORE_INDEX).all())
        assert not padding["mm_token_type_ids"].any()


def test_images_have_the_order_of_the_packed_rows():
    batch = pack([features(3, 1), features(5, 2), features(4, 1), features(9)], 0)
    # Rows [9], [5, 4] and [3]: the longest first.
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 5, 4, 3]


def test_the_first_label_of_a_sample_is_not_predicted_from_the_one_before():
    items = [features(4, answer=4), features(3, answer=3)]
    labels = pack(items, 0, one_row=True)["labels"][0]
    assert [int(label) for label in labels[[0, 4]]] == [IGNORE_INDEX, IGNORE_INDEX]
    assert int((labels != IGNORE_INDEX).sum()) == 5


def test_a_text_only_batch_has_no_pixel_values():
    assert "pixel_values" not in pack([features(3)], 0)
