"""The memory of quantizing and loading, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.speed import random_checkpoint
from tests.tiny import make_config

pytestmark = pytest.mark.slow  # they start Python and import torch
ROOT = Path(__file__).parents[2]
SHARDS = 8
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
}
BEGIN = """
import os, resource, sys
from pathlib import Path
import psutil, torch
from owl2.engine.backends import weight_only_quantization
from owl2.engine.load_model import ModelArgs
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from owl2.runtime import tune_malloc
weight_only_quantization.BLOCK = 2**16
for name in ("owl2.checkpoints.load_memory", "owl2.quantization.quantize_checkpoint"):
    sys.modules[name].BUFFERS = 0  # for models of a GB and more
tiny, model, output = sys.argv[1:4]
tune_malloc()
# Threads, caches and buffers of the first use do not count.
quantize_checkpoint(tiny, output + "-tiny")
for args in ((tiny, None), (output + "-tiny", None), (tiny, "4bit")):
    loaded = ModelArgs(args[0], "cpu", "bfloat16", quantize=args[1]).load_model()
    loaded.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
del loaded
process = psutil.Process()
def limit(size):
    used = process.memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + size, resource.RLIM_INFINITY))
"""


def run(code, *arguments):
    """The integers that the code prints."""
    command = [sys.executable, "-c", BEGIN + code, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    return [int(line) for line in result.stdout.split() if line.lstrip("-").isdigit()]


def write_checkpoint(folder, size, monkeypatch):
    monkeypatch.setitem(random_checkpoint.PRESETS, "test", make_config(**size).to_dict())
    random_checkpoint.write(folder, "test", SHARDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` with 8 files of 7 MB, and `tiny`."""
    folder = tmp_path_factory.mktemp("peak")
    with pytest.MonkeyPatch.context() as patch:
        write_checkpoint(folder / "model", SIZES, patch)
        write_checkpoint(folder / "tiny", {"vocab_size": 400}, patch)
    return folder


def sizes(folder):
    return [
        file.stat().st_size for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")
    ]


def test_quantizing_needs_one_file_of_the_checkpoint_at_a_time(folder, tmp_path):
    shards = sizes(folder / "model")
    code = f"""
limit({3 * max(shards)})
quantize_checkpoint(model, output, max_shard_size={max(shards) // 2})
"""
    run(code, folder / "tiny", folder / "model", tmp_path / "out")
    written = sum(sizes(tmp_path / "out"))
    assert 0.25 < written / sum(shards) < 0.4
    assert 3 * max(shards) < 0.5 * sum(shards)


def test_quantizing_while_loading_needs_the_quantized_size_and_one_file(folder, tmp_path):
    shards = sizes(folder / "model")
    allowed = int(0.35 * sum(shards) + 2 * max(shards))
    code = f"""
limit({allowed})
loaded = ModelArgs(model, "cpu", "bfloat16", quantize="4bit").load_model()
loaded.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
"""
    run(code, folder / "tiny", folder / "model", tmp_path / "out")
    assert allowed < 0.7 * sum(shards)
    # A complete copy does not fit: the command is refused.
    with pytest.raises(AssertionError, match="limit of the address space"):
        run(
            f"limit({allowed})\nModelArgs(model, 'cpu', 'float32').load_model()",
            *(folder / "tiny", folder / "model", tmp_path / "other"),
        )


def test_a_quantized_checkpoint_is_mapped(folder, tmp_path):
    """Loading and answering takes hardly any memory beyond the pages of the file."""
    code = """
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]
quantize_checkpoint(model, output)
before = memory()
loaded = ModelArgs(output, "cpu", "bfloat16").load_model()
print(memory()[0] - before[0])
loaded.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
after = memory()
print(sum(after) - sum(before))
"""
    anonymous, resident = run(code, folder / "tiny", folder / "model", tmp_path / "out")
    file = sum(sizes(tmp_path / "out"))
    assert anonymous < 0.2 * file
    assert resident < 1.2 * file
