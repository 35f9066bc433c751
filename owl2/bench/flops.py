"""The work of the model: FLOPs, and bytes of weights.

A FLOP is a multiplication or an addition: the product of (a, b) and (b, c) has 2abc. The counts
include matrix products and attention (causal attention has half of the pairs), and exclude norms,
activations and additions.
"""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from owl2.model.modeling import Owl2ForConditionalGeneration


def decoder_weights(model: Owl2ForConditionalGeneration) -> int:
    """Weights of the matrices that a token passes in the decoder, without `lm_head`."""
    return sum(
        weight.numel()
        for name, weight in model.model.layers.named_parameters()
        if weight.dim() == 2 and ".multiway.1." not in name
    )


def decoder_flops(
    model: Owl2ForConditionalGeneration, length: int, logits: int = 1, cached: int = 0
) -> int:
    """FLOPs of `length` positions after `cached` ones; `logits` of them pass `lm_head`."""
    config = model.config
    pairs = length * cached + length * (length + 1) // 2
    width = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * pairs * width * config.num_hidden_layers  # scores, then values
    weights = length * decoder_weights(model) + logits * model.lm_head.weight.numel()
    return 2 * weights + attention


def image_flops(baseline: Owl2ForConditionalGeneration) -> int:
    """FLOPs of one image in the vision encoder and the abstractor.

    Args:
        baseline: A model with eager attention. torch does not count fused attention on CPUs.
    """
    size = baseline.config.image_size
    with FlopCounterMode(display=False) as counter:
        baseline.get_image_features(torch.zeros(1, 3, size, size, device=baseline.device))
    return counter.get_total_flops()


def training_flops(
    model: Owl2ForConditionalGeneration, lengths: Sequence[int], labels: int, image_flops: int
) -> int:
    """FLOPs of a step that trains all parameters: backward has twice the FLOPs of forward."""
    decoder = sum(decoder_flops(model, length, logits=0) for length in lengths)
    return 3 * (decoder + 2 * labels * model.lm_head.weight.numel() + image_flops)


def decode_bytes(model: Owl2ForConditionalGeneration, itemsize: float) -> float:
    """Bytes of weights that a decode step reads once, for any number of sequences.

    Args:
        itemsize: Bytes per weight, e.g. 2 for bfloat16.
    """
    return itemsize * (decoder_weights(model) + model.lm_head.weight.numel())


def cache_bytes(model: Owl2ForConditionalGeneration, positions: int) -> int:
    """Bytes of the keys and values of `positions`, which a decode step reads."""
    config = model.config
    width = config.num_key_value_heads * config.head_dim
    return 2 * positions * width * config.num_hidden_layers * model.dtype.itemsize
