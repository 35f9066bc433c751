"""Activation checkpointing: all three parts are recomputed, and gradients are equal."""

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
from owl2.train.recipe_sections import LoraSettings
from owl2.train.trainable import apply_stage
from tests.tiny import VISION_BLOCKS, make_model
from tests.train.test_packing import samples
from tests.train.test_tracer import on_meta
from tests.train.tiny import RandomSamples, pad

LAYERS = {VisionLayer: VISION_BLOCKS, AbstractorLayer: 2, Owl2DecoderLayer: 2}


def padded():
    source = RandomSamples(4)
    return pad([source.sample_of(number) for number in range(4)])


def packed():
    return pack(samples(), 0)


def train_on(batch, stage, checkpointing, freeze=()):
    """The loss, the gradients of trainable parameters, and the runs of each kind of layer."""
    model = make_model(initializer_range=0.4).train()
    apply_stage(model, stage, freeze)
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
    ran: Counter = Counter()

    def count(kind, *_):
        ran[kind] += 1

    for module in model.modules():
        if type(module) in LAYERS:
            # Inside the layer, because recomputation does not call hooks of the layer itself.
            inner = module.crossattention if isinstance(module, AbstractorLayer) else module.mlp
            inner.register_forward_pre_hook(partial(count, type(module)))
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, ran


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize(
    ("stage", "freeze"), [(1, ()), (2, ()), (2, ("vision",))], ids=["1", "2", "2, vision frozen"]
)
def test_gradients_are_equal(layout, stage, freeze, how):
    plain = train_on(layout(), stage, False, freeze)
    recomputed = train_on(layout(), stage, how, freeze)
    assert torch.equal(plain[0], recomputed[0])
    assert plain[1].keys() == recomputed[1].keys()
    for name, gradient in plain[1].items():
        assert gradient is not None and torch.equal(gradient, recomputed[1][name]), name


@pytest.mark.parametrize("stage", [1, 2])
def test_all_three_parts_are_recomputed(stage):
    assert train_on(padded(), stage, False)[2] == LAYERS
    assert train_on(padded(), stage, True)[2] == {kind: 2 * n for kind, n in LAYERS.items()}


def test_frozen_blocks_before_trainable_ones_are_not_recomputed():
    ran = train_on(padded(), 2, True, ("vision",))[2]
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
def test_each_part_saves_less(traces, part, bound):
    """At the end of the forward pass, where the peak is; test_memory measures real runs."""
    column = [str(kind) for kind in KINDS].index(f"activations, {part}")
    full, selective, least = (trace.memory[:, column].max() for trace in traces)
    assert least < bound * full
    assert least < selective < 0.8 * full


def test_selective_checkpointing_recomputes_no_matrix_product(traces):
    full, selective, least = (trace.flops.total() for trace in traces)
    assert full == selective < least


def saved_by_part(model, batch):
    """Bytes that autograd saves, by the part that is being computed; weights do not count."""
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


def test_frozen_vision_encoder_saves_nothing():
    model = make_model().train()
    apply_stage(model, 2, ("vision",))
    kept = saved_by_part(model, padded())
    assert kept["vision"] == 0 < kept["abstractor"] and kept["layer 0"]


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_nothing_is_saved_before_the_first_trainable_weight(checkpointing):
    """LoRA on the last layer only: images, text and the first layer run without a graph."""
    model = make_model().train()
    apply_lora(model, LoraSettings(r=2), seed=0)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
    kept = saved_by_part(model, padded())
    assert kept["vision"] == kept["abstractor"] == kept["layer 0"] == 0 < kept["layer 1"]


def test_frozen_linears_do_not_save_their_inputs():
    """In stage 1 gradients pass through the frozen decoder; they need its weights only."""
    model = make_model().train()
    apply_stage(model, 1)
    trained = saved_by_part(make_model().train(), padded())
    frozen = saved_by_part(model, padded())
    # In an MLP: silu(gate) * up into `down`, and the normalized states into `gate` and `up`.
    rows = padded()["input_ids"].numel()
    inputs = 4 * rows * (model.config.intermediate_size + model.config.hidden_size)
    for layer in ("layer 0", "layer 1"):
        assert frozen[layer] <= trained[layer] - inputs
