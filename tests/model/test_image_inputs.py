"""Ids, labels, and `logits_to_keep` of the model."""

import pytest
import torch

from owl2.errors import ErrorCode
from tests.errors import raises_input_error


@pytest.mark.parametrize("wrong", [-200, -1, 41])
@pytest.mark.parametrize("length", [1, 3])
def test_ids_outside_the_vocabulary_are_named(tiny, wrong, length):
    with raises_input_error(ErrorCode.INVALID_VALUE, wrong):
        tiny(torch.tensor([[1, 5, wrong][-length:]]))


@pytest.mark.parametrize("keep", [2, torch.tensor([0, 1])])
def test_labels_of_other_positions_than_the_logits_are_refused(tiny, keep):
    ids = torch.tensor([[1, 5, 6]])
    with raises_input_error(ErrorCode.CONFLICT, "logits_to_keep"):
        tiny(ids, labels=ids, logits_to_keep=keep)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("keep", [2, torch.tensor([False, True, True])])
def test_loss_of_selected_positions(tiny, keep, return_logits):
    """ms-swift passes the labels of the positions with logits only."""
    ids = torch.tensor([[1, 5, 6]])
    labels = torch.tensor([[-100, -100, 6]])
    expected = tiny(ids, labels=labels).loss
    selected = tiny(ids, labels=labels[:, 1:], logits_to_keep=keep, return_logits=return_logits)
    torch.testing.assert_close(selected.loss, expected)
