"""Synchronizations of a forward pass: reading values of a tensor waits for the GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.tiny import make_model

READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
LABELS = torch.tensor([[-100] * 10 + [9, 11]])


class SynchronizationRecorder(TorchDispatchMode):
    """Records operations whose result depends on values of a tensor, and calls of `tolist`."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        plain = torch.Tensor.tolist

        def tolist(tensor):
            self.seen.append("tolist")
            return plain(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        boolean = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READING or boolean:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def synchronizations(monkeypatch):
    return SynchronizationRecorder(monkeypatch)


def test_synchronizations_are_counted(synchronizations):
    values = torch.tensor([1, 2])
    with synchronizations:
        int(values[0])
        bool(values.any())
        values.tolist()
        _ = values[values > 1]
    assert len(synchronizations.seen) == 4


def forward(model, **inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=True)


@pytest.mark.parametrize("mam", [True, False])
def test_decode_steps_do_not_synchronize_and_prefill_does_once(synchronizations, image_inputs, mam):
    model: Owl2ForConditionalGeneration = make_model(use_mam=mam).eval()
    with synchronizations:
        cache = forward(model, **image_inputs, logits_to_keep=1).past_key_values
    assert synchronizations.seen == ["tolist"]
    del synchronizations.seen[:]
    types = {"mm_token_type_ids": torch.zeros(1, 1).long()}
    with synchronizations:
        forward(model, input_ids=torch.tensor([[5]]), past_key_values=cache)
        forward(model, input_ids=torch.tensor([[5]]), past_key_values=cache, **types)
    assert synchronizations.seen == []


def test_explicit_token_types_need_no_further_synchronization(synchronizations, tiny, image_inputs):
    types = (image_inputs["input_ids"] == 40).long()
    with synchronizations:
        forward(tiny, **image_inputs, mm_token_type_ids=types)
    assert synchronizations.seen == ["tolist"]


def test_embeddings_synchronize_once(synchronizations, tiny, image_inputs):
    ids, pixels = image_inputs.values()
    embeds = tiny.model.embed(ids, tiny.get_image_features(pixels).pooler_output)
    for types in (None, (ids == 40).long()):
        del synchronizations.seen[:]
        with synchronizations:
            cache = forward(tiny, inputs_embeds=embeds, mm_token_type_ids=types).past_key_values
        assert synchronizations.seen == ["tolist"]
    del synchronizations.seen[:]
    with synchronizations:
        forward(tiny, inputs_embeds=embeds[:, :1], past_key_values=cache)
    assert synchronizations.seen == []


def test_training_synchronizes_twice_before_the_forward_pass(synchronizations, tiny, image_inputs):
    seen_before_vision = []
    tiny.model.vision_model.register_forward_pre_hook(
        lambda *_: seen_before_vision.append(len(synchronizations.seen))
    )
    with synchronizations:
        loss = tiny(**image_inputs, labels=LABELS, return_logits=False, use_cache=False).loss
        loss.backward()
    ours, transformers = synchronizations.seen[:2], synchronizations.seen[2:]
    assert ours == ["nonzero", "tolist"]  # the labels; the ids
    assert seen_before_vision == [2]
    assert len(transformers) <= 1  # whether rows are packed, if there is no cache
