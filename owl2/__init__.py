"""mPLUG-Owl2 and its model family: chat, fine-tune, pre-train, evaluate, serve, inspect.

`import owl2` registers the model with transformers' Auto classes, as transformers documents for
custom models. This imports transformers. The command line delays this import until a command needs
it, so that help and usage errors appear without delay.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owl2.engine.engine import Engine
    from owl2.model.configuration import Owl2Config
    from owl2.model.modeling import Owl2ForConditionalGeneration
    from owl2.processing.processor import Owl2Processor
    from owl2.scoring.scorer import ImageScorer

__version__ = "0.1.0"
__all__ = ["Engine", "ImageScorer", "Owl2Config", "Owl2ForConditionalGeneration", "Owl2Processor"]

_MODULES = {
    "Engine": "owl2.engine.engine",
    "ImageScorer": "owl2.scoring.scorer",
    "Owl2Config": "owl2.model.configuration",
    "Owl2ForConditionalGeneration": "owl2.model.modeling",
    "Owl2Processor": "owl2.processing.processor",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def _runs_as_command() -> bool:
    """Whether this process is the console script `owl2` or `python -m owl2`."""
    script = sys.argv[0] if getattr(sys, "argv", None) else ""
    return script == "-m" or Path(script).stem == "owl2"


if not _runs_as_command():
    # Each of these modules registers its classes when it is imported.
    for module in ("owl2.model.family", "owl2.processing.processor"):
        import_module(module)
