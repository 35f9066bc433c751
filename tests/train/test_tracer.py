"""Traced steps: FLOPs as torch counts them on real tensors, and as one counts by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.estimate.tracer import KINDS, MemoryKind, BatchShape, trace_step
from owl2.train.parallelize import enable_checkpointing
from owl2.train.trainable import apply_stage
from tests.tiny import make_config, make_model
from tests.train.measured import WIDE

ROWS, LENGTH, IMAGES = 2, 40, 3
SHAPE = BatchShape(ROWS, LENGTH, IMAGES)
IMAGE_TOKENS = 9


def on_meta(stage=2, checkpointing=False, **settings):
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(make_config(**WIDE | settings))
    apply_stage(model, stage)
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
    return model


def batch(model):
    ids = torch.randint(3, 1200, (ROWS, LENGTH))
    for row, count in ((0, 2), (1, 1)):
        ids[row, 1 : 1 + count * IMAGE_TOKENS] = model.config.image_token_id
    labels = ids.clone()
    labels[labels == model.config.image_token_id] = -100
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    size = model.config.image_size
    pixels = torch.randn(IMAGES, 3, size, size)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_of_a_real_step(stage, checkpointing):
    """Eager attention, as torch counts no fused attention on CPUs."""
    model = make_model(**WIDE, attn_implementation="eager").train()
    apply_stage(model, stage)
    if checkpointing:
        enable_checkpointing(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch(model), return_logits=False).loss.backward()
    eager = on_meta(stage, checkpointing, attn_implementation="eager")
    assert trace_step(eager, SHAPE).flops.total() == pytest.approx(counter.get_total_flops(), rel=1e-3)
    fused = trace_step(on_meta(stage, checkpointing), SHAPE).flops.total()
    assert fused == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_of_the_decoder_by_hand():
    width, inner, layers, words = 192, 512, WIDE["num_hidden_layers"], 1200
    linears = 2 * width * width + 2 * width * width // 2 + 3 * width * inner  # q, o; k, v; MLP
    attention = 2 * LENGTH * width  # of a token: scores and their sums over all positions
    tokens = ROWS * LENGTH
    trace = trace_step(on_meta(), SHAPE)
    by_hand = 2 * tokens * layers * (linears + attention)
    # transformers 5.16 counts a few for positions.
    assert trace.flops[MemoryKind.DECODER] == pytest.approx(by_hand, rel=1e-4)
    labelled = tokens - ROWS - IMAGES * IMAGE_TOKENS  # the first word has none before it
    assert trace.flops[MemoryKind.LOGITS] == 2 * labelled * width * words


def test_a_frozen_decoder_saves_its_weights_gradients():
    """Stage 1: forward, and backward through the decoder, but to few of its weights."""
    all_of_it, stage1 = (trace_step(on_meta(stage), SHAPE) for stage in (2, 1))
    assert all_of_it.forward_flops == stage1.forward_flops
    ratio = stage1.flops.total() / all_of_it.flops.total()
    assert 2 / 3 < ratio < 0.9


def test_computing_again_takes_most_of_a_forward_pass():
    plain = trace_step(on_meta(), SHAPE)
    again = trace_step(on_meta(checkpointing=True), SHAPE)
    head = plain.flops[MemoryKind.LOGITS]
    more = again.flops.total() - plain.flops.total()
    # Less the last product of each layer: nothing but the next layer needs it, and that has it.
    assert 0.7 < more / (plain.forward_flops - head) < 1


def test_images_are_half_of_a_mixture():
    few, many = (trace_step(on_meta(), BatchShape(4, 30, n)) for n in (1, 2))
    assert many.flops[MemoryKind.VISION] == 2 * few.flops[MemoryKind.VISION]
    none = trace_step(on_meta(), BatchShape(4, 30, 0))
    assert none.flops.get(MemoryKind.VISION, 0) == 0 < none.flops[MemoryKind.DECODER]


def test_what_is_let_go_is_not_counted():
    """After the step there are weights and gradients, and nothing that was computed on the way."""
    trace = trace_step(on_meta(), SHAPE)
    end = dict(zip(KINDS, trace.memory[-1], strict=True))
    activations = sum(end[kind] for kind in (MemoryKind.VISION, MemoryKind.ABSTRACTOR, MemoryKind.DECODER))
    assert end[MemoryKind.GRADIENTS] == 4 * sum(p.numel() for p in on_meta().parameters())
    assert activations < 0.05 * sum(trace.peak().values())


def test_later_pieces_of_a_step_stand_beside_the_gradients():
    one, two = (trace_step(on_meta(), BatchShape(ROWS, LENGTH, IMAGES, n)) for n in (1, 2))
    gradients = 4 * sum(p.numel() for p in on_meta().parameters())
    assert one.peak()[MemoryKind.GRADIENTS] < gradients == two.peak()[MemoryKind.GRADIENTS]


def test_scaled_peaks():
    trace = trace_step(on_meta(), SHAPE)
    half = trace.peak({MemoryKind.WEIGHTS: 0.5})
    assert half[MemoryKind.WEIGHTS] == trace.peak()[MemoryKind.WEIGHTS] // 2
