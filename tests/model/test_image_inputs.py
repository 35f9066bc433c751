"""Ids that no vocabulary has."""

import pytest
import torch

from owl2.errors import InputError


@pytest.mark.parametrize(
    ("wrong", "message"), [(-200, "-200 is the placeholder"), (-1, "hold -1"), (41, "hold 41")]
)
def test_ids_beyond_the_vocabulary_are_named(tiny, wrong, message):
    with pytest.raises(InputError, match=message):
        tiny(torch.tensor([[1, wrong, 5]]))


def test_labels_need_all_logits(tiny):
    ids = torch.tensor([[1, 5, 6]])
    for keep in (2, torch.tensor([0, 1])):
        with pytest.raises(InputError, match="logits_to_keep"):
            tiny(ids, labels=ids, logits_to_keep=keep)
