"""The tests of the kernels pass with the kernels for other CPUs.

`make test-arm` runs those for ARM in QEMU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from owl2.engine.backends.native import build

FOLDER = Path(__file__).parent
TESTS = [str(FOLDER / name) for name in ("test_kernels.py", "test_layer_kernels.py")]
RUN_TESTS = f"""
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *{TESTS}]))
"""

# Name: (compiler flags, flags that Linux reports for the CPU, what `owl2 info` shows)
X86 = {
    name: (*build.VARIANTS["x86_64"][name], instructions)
    for name, instructions in (
        ("x86-64-v4-amx", "AMX and AVX-512 with VNNI and BF16"),
        ("x86-64-v4-bf16", "AVX-512 with VNNI and BF16"),
        ("x86-64-v4-vnni", "AVX-512 with VNNI"),
        ("x86-64-v4", "AVX-512"),
        ("x86-64-v3-vnni", "AVX2 with VNNI"),
        ("x86-64-v3", "AVX2"),
        ("x86-64-v2", "SSE4.2"),
    )
} | {
    # AVX-VNNI on a CPU that has AVX-512 only.
    "avx_vnni.h": (
        f"-march=x86-64-v3 -include {FOLDER}/avx_vnni.h",
        "avx2 fma avx512_vnni avx512vl",
        "AVX2 with VNNI",
    ),
    # The tiles of AMX on any CPU with AVX-512.
    "AMX, emulated": (
        "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -DOWL2_EMULATED_TILES",
        "avx512_vnni avx512_bf16",
        "AMX and AVX-512 with VNNI and BF16",
    ),
    # CPUs that have no variant in the wheel.
    "AVX-512 without BW": ("-march=x86-64-v3 -mavx512f", "avx2 fma avx512f", "AVX2"),
    "AVX": ("-march=x86-64-v2 -mavx", "sse4_2 avx", "SSE4.2"),
    "SSE2": ("-march=x86-64", "sse2", "generic"),
} | {
    # The layouts of other CPUs, without their instructions: AVX-512, and bytes with VNNI.
    f"{lanes} lanes, {byte_dot}": (
        f"-march=x86-64-v3 -DOWL2_PORTABLE={lanes} -DOWL2_BYTE_DOT={byte_dot}",
        "avx2 fma",
        "AVX2",
    )
    for lanes, byte_dot in ((16, 0), (16, 1), (8, 1), (4, 1))
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", X86)
def test_x86(name, tmp_path):
    flags, required, instructions = X86[name]
    if not build.cpu_flags().issuperset(required.split()):
        pytest.skip("this CPU does not have the instructions")
    run(f"""
import sys, pytest
from owl2.engine.backends.native import build
build.NATIVE = tuple({flags.split()})
assert build.kernels().instructions == {instructions!r}
{RUN_TESTS}""", tmp_path)  # fmt: skip
    assert [*tmp_path.glob("owl2/kernels-*.so")]


# Name of a variant: (CPU of QEMU, which has the instructions and no better ones; what is shown)
ARM = {
    "armv8-a": ("cortex-a53", "NEON"),
    "armv8.2-a-dotprod": ("neoverse-n1", "NEON with dot products"),
    "armv8.6-a": ("max", "NEON with I8MM"),
}
ARM_COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.arm
@pytest.mark.parametrize("name", ARM)
def test_arm(name, tmp_path):
    assert shutil.which(ARM_COMPILER), "`make test-arm` installs it"
    flags, _ = build.VARIANTS["aarch64"][name]
    cpu, instructions = ARM[name]
    library, driver = tmp_path / "kernels.so", tmp_path / "driver"
    build.compile_library(ARM_COMPILER, tuple(flags.split()), library)
    source = FOLDER / "emulated_kernels.cpp"
    link = "-O1", "-std=c++20", "-fopenmp", "-Wl,--no-as-needed"
    subprocess.run([ARM_COMPILER, *link, source, "-o", driver], check=True)
    emulator = ["qemu-aarch64", "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu"]
    command = [*emulator, str(driver), str(library)]
    run(f"""
import sys, pytest
from owl2.engine.backends.native import build
from tests.engine.emulated_kernels import EmulatedLibrary
library = EmulatedLibrary({command})
assert library.instructions == {instructions!r}
build.kernels = lambda: build.Kernels(library, "emulated", library.instructions)
{RUN_TESTS}""", tmp_path)  # fmt: skip


def run(code, cache):
    """Run Python code in a process of its own, with a directory for compiled kernels."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=1500)
