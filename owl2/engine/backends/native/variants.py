"""The CPU kernels as shared libraries, one for each instruction set of interest.

A wheel contains all variants for its machine type, and the best one for the CPU is loaded. Without
them the kernels are compiled for this CPU on first use (`build.py`). This module imports only the
standard library: the build of the wheel runs it (``hatch_build.py``).
"""

import platform
import subprocess
from pathlib import Path

SOURCES = (
    *("kernels.cpp", "attention.h", "integer_dot.h", "matmul.h", "quantized.h", "simd.h"),
    "thread_pool.h",
)
FLAGS = ("-O3", "-std=c++20", "-fwrapv", "-fPIC", "-fopenmp")
LIBRARIES = Path(__file__).with_name("lib")  # only in a wheel

_V2 = "ssse3 sse4_1 sse4_2 popcnt cx16"
_V3 = f"{_V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
# Of a machine type, best first: name: (compiler flags, flags that Linux reports for the CPU).
VARIANTS = {
    "x86_64": {
        "x86-64-v4-bf16": (
            "-march=x86-64-v4 -mavx512vnni -mavx512bf16",
            f"{_V4} avx512_vnni avx512_bf16",
        ),
        "x86-64-v4-vnni": ("-march=x86-64-v4 -mavx512vnni", f"{_V4} avx512_vnni"),
        "x86-64-v4": ("-march=x86-64-v4", _V4),
        "x86-64-v3-vnni": ("-march=x86-64-v3 -mavxvnni", f"{_V3} avx_vnni"),
        "x86-64-v3": ("-march=x86-64-v3", _V3),
        "x86-64-v2": ("-march=x86-64-v2", _V2),
    },
    "aarch64": {
        "armv8.6-a": ("-march=armv8.6-a", "asimddp i8mm bf16"),
        "armv8.2-a-dotprod": ("-march=armv8.2-a+dotprod", "asimddp"),
        "armv8-a": ("-march=armv8-a", "asimd"),
    },
}


class BuildError(Exception):
    """The kernels cannot be compiled or loaded."""


def machine_variants() -> dict[str, tuple[str, str]]:
    """The variants for the type of this machine."""
    return VARIANTS.get(platform.machine().replace("AMD64", "x86_64"), {})


def cpu_flags() -> frozenset[str]:
    """The instruction sets of the CPU as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    fields = (line.partition(":") for line in lines)
    return frozenset(
        flag
        for name, _, value in fields
        if name.strip() in ("flags", "Features")  # ARM has Features
        for flag in value.split()
    )


def packaged_variant() -> Path | None:
    """The best library of the wheel for this CPU; None without one."""
    flags = cpu_flags()
    for name, (_, required) in machine_variants().items():
        if flags.issuperset(required.split()) and (path := LIBRARIES / f"{name}.so").exists():
            return path
    return None


def compile_library(compiler: str, flags: tuple[str, ...], output: Path) -> None:
    """Compile the kernels.

    The library uses the OpenMP library that is in the process, see `build.py`: with one of its own,
    the process would have two sets of threads.

    Args:
        flags: For the instruction set, in addition to `FLAGS`.

    Raises:
        BuildError: With the first line of the compiler's message.
    """
    source = Path(__file__).with_name(SOURCES[0])
    compiled = output.with_suffix(".o")
    for command in (
        [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(compiled)],
        [compiler, "-shared", str(compiled), "-o", str(output)],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            message = (run.stderr.strip() or "no message").splitlines()[0]
            raise BuildError(f"{compiler} failed: {message}")
    compiled.unlink()
