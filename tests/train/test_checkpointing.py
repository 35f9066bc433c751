"""Activation checkpointing: all three parts compute again, and learn exactly the same."""

from collections import Counter
from functools import partial

import pytest
import torch

from owl2.data.packing import pack
from owl2.model.abstractor import AbstractorLayer
from owl2.model.decoder import Owl2DecoderLayer
from owl2.model.vision import VisionLayer
from owl2.train.adapters import apply_lora
from owl2.train.estimate.tracer import KINDS, BatchShape, trace_step
from owl2.train.parallelize import enable_checkpointing
from owl2.train.recipe import LoraSettings
from owl2.train.trainable import apply_stage
from tests.tiny import VISION_BLOCKS, make_model
from tests.train.test_packing import samples
from tests.train.test_tracer import on_meta
from tests.train.tiny import RandomSamples, pad

LAYERS = {VisionLayer: VISION_BLOCKS, AbstractorLayer: 2, Owl2DecoderLayer: 2}


def padded():
    source = RandomSamples(4)
    return pad([source.made(number) for number in range(4)])


def packed():
    return pack(samples(), 0)


def learned(batch, stage, checkpointing, freeze=()):
    """The loss, the trained parameters' gradients, and how often each kind of layer ran."""
    model = make_model(initializer_range=0.4).train()
    apply_stage(model, stage, freeze)
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
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


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize(
    ("stage", "frozen"), [(1, ()), (2, ()), (2, ("vision",))], ids=["1", "2", "2, vision frozen"]
)
def test_gradients_are_equal(layout, stage, frozen, how):
    kept = learned(layout(), stage, False, frozen)
    again = learned(layout(), stage, how, frozen)
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


@pytest.fixture(scope="module")
def traces():
    """Without checkpointing, selective, with."""
    return [
        trace_step(on_meta(checkpointing=how), BatchShape(4, 64, 4), autocast=True)
        for how in (False, "selective", True)
    ]


@pytest.mark.parametrize(
    ("part", "bound"), [("vision encoder", 0.4), ("abstractor", 0.6), ("decoder", 0.4)]
)
def test_each_part_holds_less(traces, part, bound):
    """At the end of the forward pass, when most is held; real runs are in test_memory."""
    column = [str(kind) for kind in KINDS].index(f"activations, {part}")
    kept, some, least = (trace.memory[:, column].max() for trace in traces)
    assert least < bound * kept
    assert least < some < 0.8 * kept


def test_selective_computes_no_product_again(traces):
    kept, some, least = (trace.flops.total() for trace in traces)
    assert kept == some < least


def saved_by_part(model, batch):
    """Bytes that autograd keeps, by the part that is computed when it does, and in all of it.

    Weights themselves cost nothing to keep.
    """
    parts = {
        "vision": model.model.vision_model,
        "abstractor": model.model.visual_abstractor,
        **{f"layer {n}": layer for n, layer in enumerate(model.model.layers)},
    }
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: Counter = Counter()
    at = ["rest"]

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[at[-1]] += storage.nbytes()
        return tensor

    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: at.append(name))
        part.register_forward_hook(lambda *_: at.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, use_cache=False).loss.backward()
    return kept


def test_frozen_vision_keeps_nothing():
    model = make_model().train()
    apply_stage(model, 2, ("vision",))
    kept = saved_by_part(model, padded())
    assert kept["vision"] == 0 < kept["abstractor"] and kept["layer 0"]


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_nothing_is_kept_before_the_first_trained_weight(checkpointing):
    """LoRA on the last layer alone: images, words and the first layer run without a graph."""
    model = make_model().train()
    apply_lora(model, LoraSettings(r=2), seed=0)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
    kept = saved_by_part(model, padded())
    assert kept["vision"] == kept["abstractor"] == kept["layer 0"] == 0 < kept["layer 1"]


def test_frozen_linears_do_not_keep_their_inputs():
    """Stage 1 passes gradients through the frozen decoder: they need its weights, no inputs."""
    model = make_model().train()
    apply_stage(model, 1)
    everything = saved_by_part(make_model().train(), padded())
    some = saved_by_part(model, padded())
    # Of an MLP: silu(gate) * up into `down`, and the normed states into `gate` and `up`.
    rows = padded()["input_ids"].numel()
    inputs = 4 * rows * (model.config.intermediate_size + model.config.hidden_size)
    for layer in ("layer 0", "layer 1"):
        assert some[layer] <= everything[layer] - inputs
