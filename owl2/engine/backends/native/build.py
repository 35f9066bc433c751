"""Compilation of the CPU kernels on first use, for this machine.

It takes about three seconds. The library is stored in the user's cache directory; its name contains
a hash of the source, the compiler and the processor.
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

import torch  # noqa: F401  # loads the OpenMP library that the kernels share

from owl2.runtime import openmp_library

SOURCES = (
    "kernels.cpp",
    "attention.h",
    "integer_dot.h",
    "matmul.h",
    "quantized.h",
    "simd.h",
    "thread_pool.h",
)
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fwrapv", "-fPIC", "-fopenmp", "-shared")


class BuildError(Exception):
    """The kernels cannot be compiled or loaded."""


@cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if necessary with $CXX, else g++, c++ or clang++.

    They are stored in ``owl2`` in $XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        BuildError: There is no compiler, it failed, or the library cannot be written.
    """
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
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the CPU kernels in {directory} cannot be used: {error}") from error


@cache
def available() -> bool:
    """Whether the kernels can be used; prints once on stderr why not."""
    try:
        library()
    except BuildError as reason:
        print(f"owl2: no CPU kernels, half the speed: {reason}", file=sys.stderr)
        return False
    return True


def _fingerprint(compiler: str) -> str:
    """A hash of the sources, the flags, the compiler, the processor and OpenMP's path."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    processor = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():  # Linux
        prefixes = ("model name", "flags", "Features")  # ARM has Features
        lines = info.read_text().splitlines()
        processor = "\n".join(sorted({line for line in lines if line.startswith(prefixes)}))
    parts = [Path(__file__).with_name(source).read_bytes() for source in SOURCES]
    parts += [version, " ".join((*FLAGS, processor, openmp_library())).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def compile_into(path: Path, compiler: str) -> None:
    """Compile the kernels and move them to `path`.

    Raises:
        BuildError: With the first line of the compiler's message.
        OSError: The library cannot be written.
    """
    print("owl2: compiling the CPU kernels, once on this machine", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        output = Path(directory) / path.name
        command = [compiler, *FLAGS, str(Path(__file__).with_name(SOURCES[0])), "-o", str(output)]
        # Before the library of -fopenmp, so that the linker prefers torch's.
        if shared := openmp_library():
            command += [shared, "-Wl,--as-needed"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            message = (run.stderr.strip() or "no message").splitlines()[0]
            raise BuildError(f"{compiler} failed: {message}")
        os.replace(output, path)
