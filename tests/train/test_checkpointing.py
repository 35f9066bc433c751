"""Activation checkpointing: all three parts compute again, and learn exactly the same."""

from collections import Counter
from functools import partial

import pytest
import torch

from owl2.data.packing import pack
from owl2.model.abstractor import AbstractorLayer
from owl2.model.decoder import Owl2DecoderLayer
from owl2.model.vision import VisionLayer
from owl2.train.stages import apply_stage
from owl2.train.trace import HELD, Shape, trace_step
from owl2.train.trainer import enable_checkpointing
from tests.tiny import VISION_BLOCKS, make_model
from tests.train.test_packing import samples
from tests.train.test_trace import on_meta
from tests.train.tiny import RandomSamples, pad

LAYERS = {VisionLayer: VISION_BLOCKS, AbstractorLayer: 2, Owl2DecoderLayer: 2}


def padded():
    source = RandomSamples(4)
    return pad([source.made(number) for number in range(4)])


def packed():
    return pack(samples(), 0)


def learned(batch, stage, checkpointing, frozen=()):
    """The loss, the trained parameters' gradients, and how often each kind of layer ran."""
    model = make_model(initializer_range=0.4).train()
    apply_stage(model, stage, frozen)
    if checkpointing:
        enable_checkpointing(model)
    ran: Counter = Counter()

    def count(kind, *_):
        ran[kind] += 1

    for module in model.modules():
        if type(module) in LAYERS:
            # Not a hook, which a layer that is computed again would not reach.
            inner = module.crossattention if isinstance(module, AbstractorLayer) else module.mlp
            inner.register_forward_pre_hook(partial(count, type(module)))
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, ran


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize(
    ("stage", "frozen"), [(1, ()), (2, ()), (2, ("vision",))], ids=["1", "2", "2, vision frozen"]
)
def test_gradients_are_equal(layout, stage, frozen):
    kept = learned(layout(), stage, False, frozen)
    again = learned(layout(), stage, True, frozen)
    assert torch.equal(kept[0], again[0])
    assert kept[1].keys() == again[1].keys()
    for name, gradient in kept[1].items():
        assert gradient is not None and torch.equal(gradient, again[1][name]), name


@pytest.mark.parametrize("stage", [1, 2])
def test_all_three_parts_compute_again(stage):
    assert learned(padded(), stage, False)[2] == LAYERS
    assert learned(padded(), stage, True)[2] == {kind: 2 * n for kind, n in LAYERS.items()}


def test_what_is_not_trained_is_not_computed_again():
    ran = learned(padded(), 2, True, ("vision",))[2]
    assert ran[VisionLayer] == VISION_BLOCKS
    assert ran[AbstractorLayer] == 2 * LAYERS[AbstractorLayer]


@pytest.mark.parametrize("part", ["vision encoder", "abstractor", "decoder"])
def test_each_part_holds_less(part):
    """At the end of the forward pass, when most is held; real runs are in test_memory."""
    column = [str(kind) for kind in HELD].index(f"activations, {part}")
    kept, again = (
        trace_step(on_meta(checkpointing=on), Shape(4, 64, 4)).held[:, column].max()
        for on in (False, True)
    )
    assert again < 0.4 * kept
