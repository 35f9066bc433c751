"""Attention maps: what the decoder attends to while it generates an answer.

`collect_attention` computes `AttentionMaps`; `heat_map` and `overlay` map them to an image.
"""

from owl2.attention.attention_maps import AttentionMaps, collect_attention
from owl2.attention.heatmap import answer_words, attention_share, heat_map, overlay
from owl2.attention.tokenized_conversation import Span

__all__ = [
    "AttentionMaps",
    "Span",
    "answer_words",
    "attention_share",
    "collect_attention",
    "heat_map",
    "overlay",
]
