"""Entry points for lmms-eval (images) and lm-eval (text).

Only these modules and `owl2.eval.lm_eval` import the two packages, which takes seconds and has side
effects.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from owl2.engine.engine import Engine


def additional_tasks() -> Path:
    """The directory with tasks that lmms-eval lacks, for its ``--include_path``."""
    return Path(__file__).parent / "tasks"


def load_engine(
    pretrained: "str | Engine", device: str | None, dtype: str | None, **options: Any
) -> "tuple[Engine, Accelerator | None]":
    """The engine, and the process group if there are several processes.

    Args:
        pretrained: A directory, a hub id, or an engine.
        device: Default: cuda, mps or cpu; each of several processes uses its own GPU.
        options: As for `Engine.from_pretrained`.

    Raises:
        InputError: The checkpoint cannot be loaded.
    """
    from accelerate import Accelerator

    from owl2.engine.engine import Engine

    processes = Accelerator() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if isinstance(pretrained, Engine):
        return pretrained, processes
    where = device if processes is None else processes.device
    return Engine.from_pretrained(pretrained, where, dtype, **options), processes
