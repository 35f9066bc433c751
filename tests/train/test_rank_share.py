"""In sharded training, each process reads its share of the checkpoint."""

from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from owl2.checkpoints.lazy_weights import RankShare, WeightReader, loaded_share
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.distributed import DistributedContext
from tests.tiny import make_model
from tests.train.processes import FSDP, run

SIZES = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 4001}


def load(folder):
    return Owl2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def anonymous_memory():
    """Bytes of this process that are not pages of files."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def shard_and_compare(folder):
    """Print the memory of loading relative to the model, then compare the sharded weights."""
    with DistributedContext.open() as context:
        before = anonymous_memory()
        with context.load_share():
            model = load(folder)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        print("share", (anonymous_memory() - before) / size)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        expected = load(folder).state_dict()
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(full, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_processes_load_half_of_the_weights_each(tmp_path, dtype):
    make_model(**SIZES).to(dtype).save_pretrained(tmp_path / "model", max_shard_size="40MB")
    processes = run(
        tmp_path / "output", shard_and_compare, tmp_path / "model", count=2, environment=FSDP
    )
    for rank in range(2):
        share = next(
            float(line.split()[1])
            for line in processes.output(rank).splitlines()
            if line.startswith("share")
        )
        assert 0.4 < share < 0.65


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_shares_are_disjoint_and_complete(tmp_path, world_size):
    model = make_model()
    model.save_pretrained(tmp_path)
    total = dict.fromkeys(model.state_dict(), 0)
    for rank in range(world_size):
        token = loaded_share.set(RankShare(rank, world_size))
        state = load(tmp_path).state_dict()
        loaded_share.reset(token)
        total = {name: total[name] + tensor for name, tensor in state.items()}
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in model.state_dict().items():
        copies = world_size if name in buffers else 1
        torch.testing.assert_close(total[name], copies * tensor, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize(
    ("changes", "has_share"),
    [
        ({}, True),
        ({"FSDP_VERSION": "1"}, False),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, False),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, False),
        ({"FSDP_IGNORED_MODULES": "model.vision_model"}, False),
        ({"ACCELERATE_USE_FSDP": "false"}, False),
    ],
)
def test_only_sharding_of_rows_over_all_processes_loads_a_share(changes, has_share, monkeypatch):
    for name, value in (FSDP | changes).items():
        monkeypatch.setenv(name, value)
    with DistributedContext().load_share():
        assert loaded_share.get() == (RankShare(0, 1) if has_share else None)


def test_only_one_file_is_open(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="10KB")
    files = sorted(Path(tmp_path).glob("*.safetensors"))
    assert len(files) > 2
    reader = WeightReader(files)
    for name in reader.tensors:
        reader.read_copy(name)
    maps = Path("/proc/self/maps").read_text()
    assert sum(str(file) in maps for file in files) <= 1
