"""Traced steps: FLOPs as torch counts them for real tensors, and counted by hand."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.estimate.tracer import KINDS, BatchShape, MemoryKind, trace_step
from owl2.train.parallelize import enable_checkpointing
from owl2.train.trainable import apply_stage
from tests.tiny import make_config, make_model
from tests.train.measured import SHALLOW, WIDE

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


@pytest.fixture(scope="module")
def plain():
    """The trace of stage 2 without checkpointing."""
    return trace_step(on_meta(), SHAPE)


def forward_flops(trace):
    return trace.flops.total() - trace.flops[MemoryKind.BACKWARD]


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
def test_flops_equal_those_of_a_real_step(stage, checkpointing):
    """With eager attention, because torch does not count fused attention on CPUs."""
    model = make_model(**SHALLOW, attn_implementation="eager").train()
    apply_stage(model, stage)
    if checkpointing:
        enable_checkpointing(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch(model), return_logits=False).loss.backward()
    eager = on_meta(stage, checkpointing, **SHALLOW, attn_implementation="eager")
    assert trace_step(eager, SHAPE).flops.total() == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )
    fused = trace_step(on_meta(stage, checkpointing, **SHALLOW), SHAPE).flops.total()
    assert fused == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_of_the_decoder_counted_by_hand(plain):
    width, inner, layers, vocab_size = 192, 512, WIDE["num_hidden_layers"], 1200
    linears = 2 * width * width + 2 * width * width // 2 + 3 * width * inner  # q, o; k, v; MLP
    attention = 2 * LENGTH * width  # per token: scores and weighted sums over all positions
    tokens = ROWS * LENGTH
    by_hand = 2 * tokens * layers * (linears + attention)
    # transformers 5.16 computes the positions by a matrix product.
    assert plain.flops[MemoryKind.DECODER] == pytest.approx(by_hand, rel=1e-4)
    labeled = tokens - ROWS - IMAGES * IMAGE_TOKENS  # the first token of a row has no label
    assert plain.flops[MemoryKind.LOGITS] == 2 * labeled * width * vocab_size


def test_frozen_decoder_needs_no_weight_gradients(plain):
    stage1 = trace_step(on_meta(stage=1), SHAPE)
    assert forward_flops(plain) == forward_flops(stage1)
    ratio = stage1.flops.total() / plain.flops.total()
    assert 2 / 3 < ratio < 0.9


def test_checkpointing_recomputes_most_of_the_forward_pass(plain):
    again = trace_step(on_meta(checkpointing=True), SHAPE)
    head = plain.flops[MemoryKind.LOGITS]
    more = again.flops.total() - plain.flops.total()
    # Except the last product of each layer, which only the next layer needs.
    assert 0.7 < more / (forward_flops(plain) - head) < 1


def test_vision_flops_are_proportional_to_the_images():
    none, few, many = (trace_step(on_meta(**SHALLOW), BatchShape(4, 30, n)) for n in (0, 1, 2))
    assert many.flops[MemoryKind.VISION] == 2 * few.flops[MemoryKind.VISION]
    assert none.flops.get(MemoryKind.VISION, 0) == 0 < none.flops[MemoryKind.DECODER]


def test_freed_memory_is_not_counted(plain):
    """After the step only weights and gradients are live."""
    end = dict(zip(KINDS, plain.memory[-1], strict=True))
    activations = sum(
        end[kind] for kind in (MemoryKind.VISION, MemoryKind.ABSTRACTOR, MemoryKind.DECODER)
    )
    assert end[MemoryKind.GRADIENTS] == 4 * sum(p.numel() for p in on_meta().parameters())
    assert activations < 0.05 * sum(plain.peak().values())


def test_later_micro_batches_run_next_to_the_gradients(plain):
    two = trace_step(on_meta(), replace(SHAPE, micro_batches=2))
    gradients = 4 * sum(p.numel() for p in on_meta().parameters())
    assert plain.peak()[MemoryKind.GRADIENTS] < gradients == two.peak()[MemoryKind.GRADIENTS]


def test_peak_with_sharded_weights(plain):
    half = plain.peak({MemoryKind.WEIGHTS: 0.5})
    assert half[MemoryKind.WEIGHTS] == plain.peak()[MemoryKind.WEIGHTS] // 2
