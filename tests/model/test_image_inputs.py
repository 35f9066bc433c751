"""Ids and labels that do not fit the model."""

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
def test_labels_require_all_logits(tiny, keep):
    ids = torch.tensor([[1, 5, 6]])
    with raises_input_error(ErrorCode.CONFLICT, "logits_to_keep"):
        tiny(ids, labels=ids, logits_to_keep=keep)
