"""How much work the mathematics needs: FLOPs, and bytes of weights.

A FLOP is a multiplication or an addition, so a matrix product of (a, b) by (b, c) has 2abc.
Counted are matrix products and attention, where causal attention needs half of the pairs; norms,
activations and additions are left out, as they are in all such counts.
"""

from collections.abc import Sequence
from typing import Any

from owl2.model.configuration import Owl2Config


def decoder_matrix(config: Owl2Config) -> int:
    """Numbers in the matrices that one token passes through in the decoder, without `lm_head`."""
    sizes: Any = config  # head_dim and num_key_value_heads: never None once it is made
    width, heads, groups = config.hidden_size, config.num_attention_heads, sizes.num_key_value_heads
    attention = width * sizes.head_dim * (2 * heads + 2 * groups)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)


def head_matrix(config: Owl2Config) -> int:
    """Numbers in `lm_head`."""
    return config.hidden_size * config.vocab_size


def decoder_flops(config: Owl2Config, length: int, logits: int = 1, before: int = 0) -> int:
    """Of `length` positions after `before` cached ones, with `logits` of them through `lm_head`."""
    pairs = length * before + length * (length + 1) // 2
    sizes: Any = config  # head_dim: never None once it is made
    heads = config.num_attention_heads * sizes.head_dim
    attention = 2 * 2 * pairs * heads * config.num_hidden_layers  # scores, then values
    products = 2 * (length * decoder_matrix(config) + logits * head_matrix(config))
    return products + attention


def image_flops(config: Owl2Config) -> int:
    """Of an image through vision encoder and abstractor."""
    vision, abstractor = config.visual_config.visual_model, config.visual_config.visual_abstractor
    patches, width = vision.grid_size**2, vision.hidden_size
    tokens = 1 + patches
    block = tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * tokens**2 * width
    patch = patches * vision.num_channels * vision.patch_size**2 * width
    queries, wide = abstractor.num_learnable_queries, abstractor.hidden_size
    seen = queries + tokens
    layer = (
        2 * queries * wide**2  # query and output
        + 2 * seen * wide**2  # key and value
        + 2 * queries * seen * wide
        + 3 * queries * wide * abstractor.intermediate_size
    )
    last = queries * wide * config.hidden_size
    return 2 * (
        patch + vision.num_hidden_layers * block + abstractor.num_hidden_layers * layer + last
    )


def training_flops(config: Owl2Config, lengths: Sequence[int], labels: int, images: int) -> int:
    """Of a step in which everything learns: backward has twice the products of forward."""
    words = sum(decoder_flops(config, length, logits=0) for length in lengths)
    return 3 * (words + 2 * labels * head_matrix(config) + images * image_flops(config))


def decode_bytes(config: Owl2Config, number_bytes: float) -> float:
    """Bytes of weights that a decode step has to read once, however many sequences are in it.

    Args:
        number_bytes: of one weight: 2 for bfloat16, 1 for int8.
    """
    return number_bytes * (decoder_matrix(config) + head_matrix(config))
