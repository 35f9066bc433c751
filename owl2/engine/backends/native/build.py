"""The shared library of the CPU kernels: that of the wheel, or one compiled on first use.

A wheel contains a library for each instruction set of interest, and the best one for the CPU is
loaded. Elsewhere the kernels are compiled for this CPU, which takes about ten seconds. That library
is stored in the user's cache directory; its name contains a hash of the source, the compiler and
the processor. The build of the wheel runs this module (``hatch_build.py``), without torch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCES = (
    *("kernels.cpp", "attention.h", "integer_dot.h", "many_tokens.h", "matmul.h", "quantized.h"),
    *("quantized_tokens.h", "quantized_weight.h", "simd.h", "thread_pool.h", "tiles.h"),
)
FLAGS = ("-O3", "-std=c++20", "-fwrapv", "-fPIC", "-fopenmp")
NATIVE = ("-march=native",)
LIBRARIES = Path(__file__).with_name("lib")  # only in a wheel

_V2 = "ssse3 sse4_1 sse4_2 popcnt cx16"
_V3 = f"{_V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
# Of a machine type, best first: name: (compiler flags, flags that Linux reports for the CPU).
VARIANTS = {
    "x86_64": {
        "x86-64-v4-amx": (
            "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8",
            f"{_V4} avx512_vnni avx512_bf16 amx_tile amx_int8",
        ),
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


class Kernels(NamedTuple):
    """The library and its origin.

    Attributes:
        source: "wheel: NAME OF THE VARIANT" or "compiled on this machine".
        instructions: The vector instructions that it uses, such as "AVX2".
    """

    library: ctypes.CDLL
    source: str
    instructions: str


@cache
def kernels() -> Kernels:
    """The kernels of the wheel, else compiled with $CXX, else g++, c++ or clang++.

    Compiled ones are stored in ``owl2`` in $XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        BuildError: There is no compiler, it failed, or the library cannot be written or loaded.
    """
    # torch loads the OpenMP library that the kernels share.
    from owl2.runtime import openmp_library

    path, source = packaged_variant(), "compiled on this machine"
    if path is not None:
        source = f"wheel: {path.stem}"
    else:
        path = _compiled()
    try:
        # The kernels have no OpenMP library of their own: they find the functions of torch's.
        ctypes.CDLL(openmp_library() or "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the CPU kernels in {path.parent} cannot be used: {error}") from error
    library.instruction_set.restype = ctypes.c_char_p
    return Kernels(library, source, library.instruction_set().decode())


def library() -> ctypes.CDLL:
    """The library of `kernels`."""
    return kernels().library


@cache
def available() -> bool:
    """Whether the kernels can be used; prints once on stderr why not."""
    try:
        kernels()
    except BuildError as reason:
        print(f"owl2: no CPU kernels, half the speed: {reason}", file=sys.stderr)
        return False
    return True


def description() -> str:
    """The instructions and the origin of the kernels, or why there are none."""
    try:
        _, source, instructions = kernels()
    except BuildError as reason:
        return f"none, half the speed: {reason}"
    return f"{instructions} ({source})"


def _compiled() -> Path:
    """The library in the cache directory, compiled if necessary."""
    requested = os.environ.get("CXX")
    names = [requested] if requested else ["g++", "c++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler {requested or '(g++)'} on the PATH")
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "owl2"
    path = directory / f"kernels-{_fingerprint(compiler)}.so"
    try:
        if not path.exists():
            compile_into(path, compiler)
    except OSError as error:
        raise BuildError(f"the CPU kernels in {directory} cannot be used: {error}") from error
    return path


def _fingerprint(compiler: str) -> str:
    """A hash of the sources, the flags, the compiler and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    processor = [platform.processor(), *sorted(cpu_flags())]
    if (info := Path("/proc/cpuinfo")).exists():  # Linux
        names = {line for line in info.read_text().splitlines() if line.startswith("model name")}
        processor += sorted(names)
    parts = [Path(__file__).with_name(source).read_bytes() for source in SOURCES]
    parts += [version, " ".join((*FLAGS, *NATIVE, *processor)).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def compile_into(path: Path, compiler: str) -> None:
    """Compile the kernels for this CPU and move them to `path`.

    Raises:
        BuildError: With the first line of the compiler's message.
        OSError: The library cannot be written.
    """
    print("owl2: compiling the CPU kernels, once on this machine", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        output = Path(directory) / path.name
        compile_library(compiler, NATIVE, output)
        os.replace(output, path)


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

    The library uses the OpenMP library that is in the process: with one of its own, the process
    would have two sets of threads.

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
