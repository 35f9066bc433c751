"""Devices and dtypes by name, and settings of the CPU and the C library."""

import ctypes
import importlib.metadata
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from owl2.errors import ErrorCode, InputError
from owl2.memory import available_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
LARGEST = 2**31 - 1


def package_versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def tune_malloc() -> None:
    """Keep freed memory in the process for later tensors.

    By default glibc requests memory for each large tensor from the system and returns it, so that
    the system fills every page with zeros again. That takes 10 to 20 % of the time of a prompt or a
    training step. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, LARGEST)
    mallopt(ARENA_MAX, 1)  # only the first arena can contain large tensors


@cache
def cpu_supports_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions. Without them bfloat16 is slower than float32.

    False if torch is too old to report it.
    """
    return _has_instructions("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")


@cache
def cpu_supports_fp16() -> bool:
    """Whether this CPU has float16 instructions. Without them float16 is slower than float32.

    Current CPUs other than x86 have them.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or _has_instructions("avx512_fp16", "amx_fp16")


@cache
def cpu_supports_amx() -> bool:
    """Whether this CPU multiplies tiles of bfloat16. False if torch is too old to report it."""
    return _has_instructions("amx_bf16")


def _has_instructions(*names: str) -> bool:
    """Whether this CPU has one of these instruction sets, by torch's names."""
    get_capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = get_capabilities()
    return any(capabilities.get(name) for name in names)


def multiplies_in_float32(x: torch.Tensor) -> bool:
    """Whether matrix products with `x` are computed in float32, because it has 16 bits on a CPU
    without instructions for its dtype. Gradients are computed in the dtype of `x`."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if x.dtype == torch.float16:
        return not cpu_supports_fp16()
    return x.dtype == torch.bfloat16 and not cpu_supports_bf16()


def select_device(device: str | torch.device | None = None) -> torch.device:
    """The requested device; without one the first that is available of cuda, mps and cpu.

    Raises:
        InputError: torch does not know the device, or this machine does not have it.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    devices = [("cuda", index) for index in range(torch.cuda.device_count())]
    devices += [("mps", 0)] * torch.backends.mps.is_available() + [("cpu", 0)]
    try:
        selected = torch.device(device)
    except RuntimeError as error:
        raise _unknown_device(device, devices) from error
    if (selected.type, selected.index or 0) not in devices:
        raise _unknown_device(device, devices)
    return selected


def _unknown_device(device: object, devices: list[tuple[str, int]]) -> InputError:
    names = ", ".join(f"{kind}:{index}" for kind, index in devices)
    return InputError(
        f"device {str(device)!r} is not available; this machine has {names}.",
        ErrorCode.UNSUPPORTED,
    )


def free_memory(device: torch.device) -> int:
    """The bytes that tensors on a device can still take; also within the limit of a container."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def select_dtype(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The requested dtype (a name or a torch dtype); without one the best for the device.

    Raises:
        InputError: The name is not in `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:  # not by `look_up`, whose module imports pydantic
            raise InputError(
                f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}.", ErrorCode.UNKNOWN_NAME
            )
        return DTYPES[dtype]
    if device.type == "cuda":
        # bfloat16 has the range of float32, so that nothing overflows. GPUs before Ampere emulate
        # it slowly. They use float16, as the authors do for the released checkpoint.
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float16
    if device.type == "mps":
        return torch.float16  # every macOS with MPS supports it; bfloat16 needs a recent one
    # CPUs without bfloat16 instructions convert to 32 bits, which is slower.
    return torch.bfloat16 if cpu_supports_bf16() else torch.float32


@cache
def openmp_library() -> str:
    """The path of the GNU OpenMP library that torch has loaded; "" if it is unknown.

    Other packages may have loaded copies of their own.
    """
    try:
        maps = Path("/proc/self/maps").read_text().split()
    except OSError:  # not Linux
        return ""
    paths = [path for path in maps if "/libgomp" in path]
    return next((path for path in paths if "/torch/" in path), paths[0] if paths else "")


@cache
def _load_openmp() -> ctypes.CDLL | None:
    return ctypes.CDLL(openmp_library()) if openmp_library() else None


def use_one_openmp_thread() -> None:
    """Let the calling thread compute alone; other threads are not affected.

    `torch.set_num_threads` would also set the number for other threads.
    """
    if (library := _load_openmp()) is not None:
        torch.get_num_threads()  # otherwise torch would set its number at the first operation
        library.omp_set_num_threads(1)


def release_openmp_threads() -> None:
    """End the OpenMP threads that belong to the calling thread; the next operation restarts them.

    Each Python thread that computes has OpenMP threads. As soon as a process has more of them than
    cores, all of them sleep after every operation instead of polling for the next one.
    """
    if (library := _load_openmp()) is not None:
        soft = 1  # omp_pause_soft
        library.omp_pause_resource_all(soft)
