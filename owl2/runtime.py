"""What this machine's CPU and C library offer to torch."""

import ctypes
from typing import Any

import torch

# glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
LARGEST = 2**31 - 1


def keep_memory() -> None:
    """Let the process keep what it frees, for the next tensor of that size.

    glibc asks the system for each large tensor and gives it back, so that every activation is made
    of fresh pages, which the system fills with zeros one by one: a tenth to a fifth of the time of
    a prompt or a training step. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, LARGEST)
    mallopt(ARENA_MAX, 1)  # others than the first cannot hold large tensors


def has_bfloat16() -> bool:
    """Whether this CPU multiplies numbers in bfloat16 itself: others take float32's time and more.

    False if torch is too old to say.
    """
    ask: Any = getattr(torch.cpu, "get_capabilities", dict)
    can = ask()
    return any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
