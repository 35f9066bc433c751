"""Reading of weight files into the page cache while Python imports and builds the model.

A memory-mapped file is read in small parts, each when it is first used. A disk that serves many
requests at the same time is faster, and is idle while modules are imported.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from owl2.memory import available_memory

STEP = 2**20  # bytes per request; the kernel ignores what exceeds its read-ahead window
SUFFIXES = (".safetensors", ".bin")


def read_ahead(model: str | Path | None) -> Thread | None:
    """Start to read the weight files of a local checkpoint, in the background.

    Returns:
        The thread, or None if there is nothing to read: not a directory with weights, not enough
        memory for all of them, or a system without `os.posix_fadvise`.
    """
    if model is None or not hasattr(os, "posix_fadvise"):
        return None
    folder = Path(model).expanduser()
    try:
        files = [file for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES]
        size = sum(file.stat().st_size for file in files)
    except OSError:
        return None  # loading the model reports it
    if not files or size > available_memory():
        return None
    thread = Thread(target=_advise, args=(files,), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _advise(files: Sequence[Path]) -> None:
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue  # loading the model reports it
        try:
            for start in range(0, os.fstat(descriptor).st_size, STEP):
                os.posix_fadvise(descriptor, start, STEP, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
