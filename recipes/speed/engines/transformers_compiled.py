"""transformers' `generate` with a static cache and compiled decode steps."""

from engines import Answer, Task, transformers
from engines.transformers import BITS, PACKAGES

__all__ = ["BITS", "PACKAGES", "prepare"]


def prepare(task: Task) -> Answer:
    """See `engines`."""
    from transformers import CompileConfig

    settings = CompileConfig(fullgraph=False, mode="default")
    settings._compile_all_devices = True  # by default, it compiles on accelerators only
    return transformers.prepare(task, cache_implementation="static", compile_config=settings)
