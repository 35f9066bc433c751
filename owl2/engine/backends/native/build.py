"""The shared library of the CPU kernels: that of the wheel, or one compiled on first use.

A wheel contains libraries for several instruction sets. Elsewhere the kernels are compiled for this
CPU, which takes about ten seconds. That library is stored in the user's cache directory; its name
contains a hash of the source, the compiler and the processor.
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

import torch  # noqa: F401  # loads the OpenMP library that the kernels share

from owl2.engine.backends.native import variants
from owl2.engine.backends.native.variants import BuildError
from owl2.runtime import openmp_library

NATIVE = ("-march=native",)


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
    path, source = variants.packaged_variant(), "compiled on this machine"
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
    processor = [platform.processor(), *sorted(variants.cpu_flags())]
    if (info := Path("/proc/cpuinfo")).exists():  # Linux
        names = {line for line in info.read_text().splitlines() if line.startswith("model name")}
        processor += sorted(names)
    parts = [Path(__file__).with_name(source).read_bytes() for source in variants.SOURCES]
    parts += [version, " ".join((*variants.FLAGS, *NATIVE, *processor)).encode()]
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
        variants.compile_library(compiler, NATIVE, output)
        os.replace(output, path)
