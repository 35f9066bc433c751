"""Ids, labels, and `logits_to_keep` of the model."""

import pytest
import torch
from torch.nn import functional

from owl2.errors import ErrorCode
from tests.errors import raises_input_error


@pytest.mark.parametrize("wrong", [-200, -1, 41])
@pytest.mark.parametrize("length", [1, 3])
def test_ids_outside_the_vocabulary_are_named(tiny, wrong, length):
    with raises_input_error(ErrorCode.INVALID_VALUE, wrong):
        tiny(torch.tensor([[1, 5, wrong][-length:]]))


@pytest.mark.parametrize("keep", [2, torch.tensor([0, 1])])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_other_positions_than_the_logits_are_refused(tiny, keep, name):
    ids = torch.tensor([[1, 5, 6, 7]])
    with raises_input_error(ErrorCode.CONFLICT, "logits_to_keep"):
        tiny(ids, **{name: ids[:, :3]}, logits_to_keep=keep)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("keep", [2, torch.tensor([False, True, True])])
def test_loss_of_selected_positions(tiny, keep, return_logits):
    """ms-swift passes the labels of the positions with logits only."""
    ids = torch.tensor([[1, 5, 6]])
    labels = torch.tensor([[-100, -100, 6]])
    expected = tiny(ids, labels=labels).loss
    selected = tiny(ids, labels=labels[:, 1:], logits_to_keep=keep, return_logits=return_logits)
    torch.testing.assert_close(selected.loss, expected)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("mask", [False, True])
def test_labels_with_gaps_between_selected_positions(tiny, image_inputs, mask, return_logits):
    """Labels of all positions, those of ms-swift, and shifted ones. Others would be wrong."""
    ids = image_inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labeled = torch.tensor([2, 6, 11])
    labels[:, labeled] = ids[:, labeled]
    expected = tiny(**image_inputs, labels=labels).loss
    keep = torch.tensor([1, 5, 10, 11])
    options = {"logits_to_keep": keep, "return_logits": return_logits}
    if mask:
        options["logits_to_keep"] = torch.zeros(ids.shape[1], dtype=torch.bool).index_fill(
            0, keep, 1
        )
    following = functional.pad(ids[:, labeled], (0, 1), value=-100)
    for own in (
        {"labels": labels},
        {"labels": functional.pad(ids[:, labeled], (1, 0), value=-100)},
        {"shift_labels": following},
    ):
        torch.testing.assert_close(tiny(**image_inputs, **own, **options).loss, expected)
    with raises_input_error(ErrorCode.CONFLICT, "shift_labels"):
        tiny(**image_inputs, labels=labels[:, keep].fill_(9), **options)
