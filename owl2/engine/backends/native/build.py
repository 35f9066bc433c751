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

SOURCES = ("kernels.cpp", "attention.h", "simd.h", "matmul.h", "thread_pool.h")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-shared")


class BuildError(Exception):
    """The kernels cannot be compiled or loaded."""


@cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if necessary.

    Raises:
        BuildError: There is no compiler, or it failed.
    """
    compiler = find_compiler()
    path = cache_directory() / f"kernels-{fingerprint(compiler)}.so"
    if not path.exists():
        compile_into(path, compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


@cache
def available() -> bool:
    """Whether the kernels can be used; prints once on stderr why not."""
    try:
        library()
    except BuildError as reason:
        print(f"owl2: no CPU kernels, half the speed: {reason}", file=sys.stderr)
        return False
    return True


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++ on the PATH."""
    requested = os.environ.get("CXX")
    for name in [requested] if requested else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler {requested or '(g++)'} on the PATH")


def cache_directory() -> Path:
    """The directory of the compiled library: ``owl2`` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "owl2"


def fingerprint(compiler: str) -> str:
    """A hash of the sources, the flags, the compiler, the processor and OpenMP's path."""
    here = Path(__file__).parent
    parts = [(here / source).read_bytes() for source in SOURCES]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts += [" ".join(FLAGS).encode(), version, _processor().encode(), openmp_library().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    prefixes = ("model name", "flags", "Features")  # ARM has Features
    return "\n".join(sorted({line for line in lines if line.startswith(prefixes)}))


def compile_into(path: Path, compiler: str) -> None:
    """Compile the kernels and move them to `path`.

    Raises:
        BuildError: With the first line of the compiler's message.
    """
    print("owl2: compiling the CPU kernels, once on this machine", file=sys.stderr, flush=True)
    source = Path(__file__).with_name(SOURCES[0])
    shared = openmp_library()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            library_path = Path(directory) / path.name
            command = [compiler, *FLAGS, str(source), "-o", str(library_path)]
            # Before the library of -fopenmp, so that the linker prefers torch's.
            run = subprocess.run(
                [*command, *([shared, "-Wl,--as-needed"] if shared else [])],
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode:
                message = (run.stderr.strip() or "no message").splitlines()
                raise BuildError(f"{compiler} failed: {message[0]}")
            os.replace(library_path, path)
    except OSError as error:
        raise BuildError(f"the CPU kernels cannot be written to {path.parent}: {error}") from error
