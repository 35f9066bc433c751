"""The CPU kernels: compiled on first use for this very machine, then kept on disk.

A compiler takes about three seconds for `kernels.cpp`. What it makes lies in the user's cache
directory under a name that stands for the source, the compiler and the processor, so that the
second start, also of another version, finds what fits or makes its own.
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

import torch  # noqa: F401  # loads the OpenMP library that the kernels are to share

SOURCES = ("kernels.cpp", "attention.h", "simd.h", "matmul.h", "thread_pool.h")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-shared")


class NotBuilt(Exception):
    """Why there are no kernels, in a line for people."""


@cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if need be.

    Raises:
        NotBuilt: no compiler, or it failed.
    """
    compiler = find_compiler()
    path = cache_directory() / f"kernels-{fingerprint(compiler)}.so"
    if not path.exists():
        compile_into(path, compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(f"{path} cannot be loaded: {error}") from error


@cache
def available() -> bool:
    """Whether there are kernels; says once on stderr why not."""
    try:
        library()
    except NotBuilt as reason:
        print(f"owl2: {reason}; answers take about twice as long", file=sys.stderr)
        return False
    return True


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++ on the PATH."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise NotBuilt(f"no C++ compiler {asked or '(g++)'} on the PATH")


def cache_directory() -> Path:
    """Where compiled code is kept: ``owl2`` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "owl2"


def fingerprint(compiler: str) -> str:
    """Stands for the sources, the flags, the compiler and the processor."""
    here = Path(__file__).parent
    parts = [(here / source).read_bytes() for source in SOURCES]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts += [" ".join(FLAGS).encode(), version, _processor().encode(), _openmp().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    wanted = ("model name", "flags", "Features")  # the last: ARM's name for flags
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _openmp() -> str:
    """The OpenMP library that torch has loaded; "" where that cannot be told.

    Threads of a second one would wait for a core while torch's keep them busy.
    """
    try:
        maps = Path("/proc/self/maps").read_text().split()
    except OSError:
        return ""
    return next((path for path in maps if "/libgomp" in path), "")


def compile_into(path: Path, compiler: str) -> None:
    """Compile the kernels to `path`, all of it or nothing.

    Raises:
        NotBuilt: with the compiler's first line of complaint.
    """
    print("owl2: compiling its CPU kernels, once on this machine ...", file=sys.stderr, flush=True)
    source = Path(__file__).with_name(SOURCES[0])
    shared = _openmp()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            command = [compiler, *FLAGS, str(source), "-o", str(made)]
            # Named before -fopenmp's own, the linker takes the functions from this one.
            run = subprocess.run(
                [*command, *([shared, "-Wl,--as-needed"] if shared else [])],
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode:
                complaint = (run.stderr.strip() or "no message").splitlines()
                raise NotBuilt(f"{compiler} failed: {complaint[0]}")
            os.replace(made, path)
    except OSError as error:
        raise NotBuilt(f"the CPU kernels cannot be kept in {path.parent}: {error}") from error
