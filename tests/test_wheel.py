"""A wheel contains the CPU kernels, which need no compiler."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from owl2.engine.backends.native import build

ROOT = Path(__file__).parents[1]
USE = """
import torch
from owl2.engine.backends.native import build, ops
x, weight = torch.randn(3, 64), torch.randn(20, 64)
torch.testing.assert_close(ops.linear(x, weight), x @ weight.T, atol=1e-4, rtol=0)
print(build.__file__, build.description(), sep="\\n")
"""


@pytest.mark.slow
def test_a_wheel_has_kernels_for_every_cpu_and_needs_no_compiler(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OWL2_KERNELS": "1"}, check=True, timeout=900
    )
    [wheel] = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    libraries = tmp_path / "installed/owl2/engine/backends/native/lib"
    assert {file.stem for file in libraries.iterdir()} == set(build.machine_variants())
    for library in libraries.iterdir():  # torch's OpenMP library is used
        assert b"libgomp.so" not in library.read_bytes()
    (tmp_path / "empty").mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": str(tmp_path / "empty")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    run = subprocess.run(
        [sys.executable, "-c", USE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=280,
    )
    file, description = run.stdout.splitlines()
    assert str(tmp_path) in file
    names = build.machine_variants()
    flags = build.cpu_flags()
    best = next(name for name, (_, needed) in names.items() if flags.issuperset(needed.split()))
    assert f"(wheel: {best})" in description
    assert not (tmp_path / "cache").exists()
