"""Looking inside: where the decoder attends while it answers, over the words and over the image.

::

    look ──► Looks (arrays) ──heat_map──► (H, W) over an image ──overlay──► the image, painted
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owl2.attention.attention_maps import Looks, look
    from owl2.attention.heatmap import heat_map, overlay, share_of, words_of
    from owl2.attention.tokenized_dialogue import Span

_ROOMS = {
    "heat": ("heat_map", "overlay", "share_of", "words_of"),
    "looks": ("Looks", "look"),
    "script": ("Span",),
}
__all__ = ["Looks", "Span", "heat_map", "look", "overlay", "share_of", "words_of"]


def __getattr__(name: str) -> Any:
    # Only when asked for: torch takes seconds, and who draws a page needs none of it at first.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
