"""The work of the model: FLOPs, and bytes of weights.

A FLOP is a multiplication or an addition: the product of (a, b) and (b, c) has 2abc. The counts
include matrix products and attention (causal attention has half of the pairs), and exclude norms,
activations and additions.
"""

from collections.abc import Sequence
from typing import Any

from owl2.model.configuration import Owl2Config


def decoder_parameters(config: Owl2Config) -> int:
    """Parameters of the matrices that one token passes in the decoder, without `lm_head`."""
    sizes: Any = config  # head_dim and num_key_value_heads are never None after __init__
    width, heads, groups = config.hidden_size, config.num_attention_heads, sizes.num_key_value_heads
    attention = width * sizes.head_dim * (2 * heads + 2 * groups)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)


def head_parameters(config: Owl2Config) -> int:
    """Parameters of `lm_head`."""
    return config.hidden_size * config.vocab_size


def decoder_flops(config: Owl2Config, length: int, logits: int = 1, cached: int = 0) -> int:
    """FLOPs of `length` positions after `cached` ones; `logits` of them pass `lm_head`."""
    pairs = length * cached + length * (length + 1) // 2
    sizes: Any = config  # head_dim is never None after __init__
    width = config.num_attention_heads * sizes.head_dim
    attention = 2 * 2 * pairs * width * config.num_hidden_layers  # scores, then values
    products = 2 * (length * decoder_parameters(config) + logits * head_parameters(config))
    return products + attention


def image_flops(config: Owl2Config) -> int:
    """FLOPs of one image in the vision encoder and the abstractor."""
    vision, abstractor = config.visual_config.visual_model, config.visual_config.visual_abstractor
    patches, width = vision.grid_size**2, vision.hidden_size
    tokens = 1 + patches
    block = tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * tokens**2 * width
    patch = patches * vision.num_channels * vision.patch_size**2 * width
    queries, inner = abstractor.num_learnable_queries, abstractor.hidden_size
    keys = queries + tokens
    layer = (
        2 * queries * inner**2  # query and output
        + 2 * keys * inner**2  # key and value
        + 2 * queries * keys * inner
        + 3 * queries * inner * abstractor.intermediate_size
    )
    projection = queries * inner * config.hidden_size
    encoder = patch + vision.num_hidden_layers * block
    return 2 * (encoder + abstractor.num_hidden_layers * layer + projection)


def training_flops(config: Owl2Config, lengths: Sequence[int], labels: int, images: int) -> int:
    """FLOPs of a step that trains all parameters: backward has twice the FLOPs of forward."""
    decoder = sum(decoder_flops(config, length, logits=0) for length in lengths)
    return 3 * (decoder + 2 * labels * head_parameters(config) + images * image_flops(config))


def decode_bytes(config: Owl2Config, itemsize: float) -> float:
    """Bytes of weights that a decode step reads once, for any number of sequences.

    Args:
        itemsize: bytes per weight, e.g. 2 for bfloat16.
    """
    return itemsize * (decoder_parameters(config) + head_parameters(config))
