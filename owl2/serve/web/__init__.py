"""The web page: ask about images in a browser, and see where the model looked.

::

    mounting ──► page (what stands where) ──► asking ──► AdmissionController ──► engine
                                          └─► looked ──► owl2.attention

All words are in `texts`; how it looks is in `page.css`, what the browser does in `page.js`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owl2.serve.web.examples import read_examples
    from owl2.serve.web.mount import mount
    from owl2.serve.web.page import make_page

_ROOMS = {"make_page": "page", "mount": "mounting", "read_examples": "examples"}
__all__ = ["make_page", "mount", "read_examples"]


def __getattr__(name: str) -> Any:
    # Only when asked for: gradio takes seconds.
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
