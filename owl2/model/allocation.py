"""How the C library hands out memory to torch on a CPU."""

import ctypes

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
