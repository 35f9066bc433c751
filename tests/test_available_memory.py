"""The limits of memory, and commands that are refused before they read weights."""

import resource
import subprocess
import sys

import psutil
import pytest

from owl2 import memory
from owl2.checkpoints.lazy_weights import WeightReader
from owl2.checkpoints.load_memory import loaded_size
from owl2.cli.info import memory_of_commands
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode
from owl2.memory import (
    ADDRESS_SPACE,
    CGROUP,
    MEMORY,
    memory_limits,
    peak_resident_memory,
    require_memory,
)
from owl2.model.configuration import Owl2Config
from tests.errors import raises_input_error

MIB = 2**20


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """The root of the cgroups, without limits."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_cgroups", lambda: iter([tmp_path / "a" / "b", tmp_path / "a"]))
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


def test_peak_is_not_that_of_the_parent():
    """With getrusage, a process on Linux starts with the maximum of the one that started it."""
    program = "from owl2.memory import peak_resident_memory; print(peak_resident_memory())"
    ballast = b"1" * (500 * MIB)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert MIB < int(result.stdout) < 0.75 * peak_resident_memory()
    assert peak_resident_memory() > len(ballast)


def test_limits_of_this_machine(cgroups):
    limits = memory_limits()
    assert 0 < limits[MEMORY] <= psutil.virtual_memory().total
    assert CGROUP not in limits


@pytest.mark.parametrize(
    ("names", "cached"),
    [
        (("memory.max", "memory.current"), "inactive_file"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_cgroups(cgroups, names, cached):
    """The parent has the lower limit; cached file contents are not used memory."""
    for folder, limit, used in ((cgroups / "a" / "b", 900, 300), (cgroups / "a", 500, 300)):
        for name, value in zip(names, (limit, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cached} 100\n")
    assert memory_limits()[CGROUP] == 300
    (cgroups / "a" / names[0]).write_text("max\n" if names[0] == "memory.max" else f"{2**63}\n")
    assert memory_limits()[CGROUP] == 700


def test_address_space(cgroups, monkeypatch):
    used = psutil.Process().memory_info().vms
    limits = lambda kind: (used + 100 * MIB, resource.RLIM_INFINITY)  # noqa: E731
    monkeypatch.setattr(resource, "getrlimit", limits)
    assert 0 < memory_limits()[ADDRESS_SPACE] <= 110 * MIB
    require_memory("Loading", 10 * MIB, mapped=20 * MIB)
    with raises_input_error(ErrorCode.OUT_OF_MEMORY, "0.3 GB", "Loading", "advice"):
        require_memory("Loading", 10 * MIB, mapped=300 * MIB, advice="advice")


@pytest.fixture
def little_memory(cgroups, monkeypatch):
    """20 KB of memory; weights cannot be read."""
    monkeypatch.setattr(memory, "memory_limits", lambda: {MEMORY: 20_000})

    def fail(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr("transformers.modeling_utils.load_state_dict", fail)
    monkeypatch.setattr(WeightReader, "read", fail)


@pytest.mark.parametrize("quantize", [(), ("--quantize", "8bit")])
def test_a_model_that_does_not_fit(run_cli, tiny_checkpoint, little_memory, quantize):
    result = run_cli("chat", "--model", tiny_checkpoint, "--device", "cpu", *quantize, "what?")
    assert result.exit_code == 2
    for needle in (str(tiny_checkpoint), MEMORY, "--quantize 4bit", "owl2 quantize"):
        assert needle in result.stderr


def test_quantizing_that_does_not_fit(run_cli, tiny_checkpoint, little_memory, tmp_path):
    result = run_cli("quantize", tiny_checkpoint, tmp_path / "out")
    assert result.exit_code == 2
    assert MEMORY in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_estimate_is_the_size_of_the_model(tiny_checkpoint):
    for dtype in ("float32", "bfloat16"):
        for quantize in (None, "4bit", "8bit"):
            model = ModelArgs(tiny_checkpoint, "cpu", dtype, quantize=quantize).load_model()
            config = getattr(model.config, "quantization_config", None)
            size = sum(tensor.nbytes for tensor in model.state_dict().values())
            reader = WeightReader([tiny_checkpoint / "model.safetensors"])
            assert loaded_size(reader.tensors, model.dtype, config) == size


def test_memory_of_the_released_size():
    needed = memory_of_commands(Owl2Config())
    values = 8_197_859_328
    assert next(iter(needed.values())) in (
        pytest.approx(2 * values, rel=0.01),
        pytest.approx(4 * values, rel=0.01),
    )
    assert 4.5e9 < needed["chat --quantize 4bit"] < 7e9
    assert needed["chat --quantize 8bit"] - needed["chat --quantize 4bit"] == pytest.approx(
        3.3e9, rel=0.02
    )
    # The largest tensor and two files of the output; tokens, statistics and the result.
    assert 1.2e9 < needed["quantize"] < 2e9
    assert 12e9 < needed["quantize --method gptq"] < 24e9
