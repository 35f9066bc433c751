"""Real processes that are killed: the same command resumes, bit for bit."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from owl2.errors import ErrorCode
from owl2.train.recipe import Recipe
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.train.processes import owl2, run, start
from tests.train.runs import Killed, kill_at, quiet, read_jsonl, recorded, wait_for, write_recipe
from tests.train.tiny import SMALL_RUN

CASES = {
    "full": {},
    "packed": {"packing": True},
    "workers": {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
    "LoRA": {"lora": {"r": 2, "lora_dropout": 0.1, "modules_to_save": ["abstractor"]}, "stage": 2},
    "two processes": {},
    "selective, bfloat16": {
        "packing": True,
        "gradient_checkpointing": "selective",
        "dtype": "bfloat16",
    },
}


@pytest.fixture
def settings(world, tmp_path):
    files = {"model": str(world / "start"), "data": [{"file": str(world / "data.json")}]}
    own = {"output": str(tmp_path / "run"), "augment": "dihedral", "max_steps": 24, "save_steps": 3}
    return SMALL_RUN | files | own


def kill_while(condition, processes, checkpoints, pause=0.0):
    """Send SIGKILL to all processes, `pause` seconds after the condition on the checkpoints."""
    end = time.monotonic() + 60
    while not condition(checkpoints):
        assert time.monotonic() < end, processes.output()
        assert all(member.is_alive() for member in processes.members), processes.output()
        time.sleep(0.001)  # a state of this size takes some hundredths to write
    time.sleep(pause)
    for member in processes.members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    return processes.wait()


def latest(checkpoints):
    path = checkpoints / "latest.json"
    return json.loads(path.read_text())["checkpoint"] if path.exists() else None


def has_a_checkpoint(checkpoints):
    return latest(checkpoints) is not None


def is_writing_a_checkpoint(checkpoints):
    """A checkpoint is being written next to a complete one."""
    names = [path.name for path in checkpoints.glob("checkpoint-*")]
    return latest(checkpoints) is not None and len(names) > 1


def log_without_times(output):
    """The loss, the schedule and the counts of a log."""
    lines = read_jsonl(output / "log.jsonl")
    keys = ("step", "epoch", "loss", "smoothed_loss", "learning_rate", "grad_norm")
    return [[line[key] for key in (*keys, "samples", "tokens", "images")] for line in lines]


def assert_same_model(one, other):
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in other.glob("*.safetensors"))
    for name in files:
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    "case",
    [case if case == "full" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_run_killed_twice_and_resumed_equals_uninterrupted(settings, tmp_path, case):
    settings = settings | CASES[case]
    count = 2 if case == "two processes" else 1
    uninterrupted = Recipe(**settings | {"output": str(tmp_path / "uninterrupted")})
    run(tmp_path / "output0", train, uninterrupted, count=count)
    command = ("train", write_recipe(tmp_path, settings))
    checkpoints = tmp_path / "run" / "checkpoints"
    rng = random.Random(case)
    processes = start(tmp_path / "output1", owl2, *command, count=count)
    codes = kill_while(has_a_checkpoint, processes, checkpoints, rng.random() / 4)
    assert set(codes) == {-signal.SIGKILL}
    first = latest(checkpoints)
    processes = start(tmp_path / "output2", owl2, *command, count=count)
    kill_while(
        lambda path: latest(path) != first and is_writing_a_checkpoint(path), processes, checkpoints
    )
    processes = run(tmp_path / "output3", owl2, *command, count=count)
    assert "Resuming after step" in processes.output(0)
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "uninterrupted")
    assert_same_model(tmp_path / "uninterrupted" / "model", tmp_path / "run" / "model")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in left if "part" in name or name == "checkpoints"]


@pytest.fixture
def killed(settings, tmp_path):
    """The recipe of a run that was killed, and its checkpoints directory."""
    recipe = Recipe(**settings | {"max_steps": 8, "save_steps": 5})
    checkpoints = tmp_path / "run" / "checkpoints"

    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            train(recipe, quiet())
    assert latest(checkpoints) == "checkpoint-5"
    return recipe, checkpoints


def files_of(checkpoints):
    directory = checkpoints / latest(checkpoints)
    return directory, sorted(path for path in directory.rglob("*") if path.is_file())


def test_truncated_file_of_a_checkpoint_is_refused(killed):
    recipe, checkpoints = killed
    _, files = files_of(checkpoints)
    assert len(files) > 6
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with raises_input_error(ErrorCode.RESUME_MISMATCH, path.name):
            train(recipe, quiet())
        path.write_bytes(content)
    assert train(recipe, quiet()).finished


def test_incomplete_checkpoint_is_neither_used_nor_kept(killed, monkeypatch):
    recipe, checkpoints = killed
    directory, _ = files_of(checkpoints)
    shutil.copytree(directory, checkpoints / "checkpoint-7")
    (checkpoints / "checkpoint-7" / "rng_state_7.pth").touch()
    part = checkpoints.parent / ".model.part-abc"
    part.mkdir()
    console = recorded()
    found = []
    training_step = Owl2Trainer.training_step

    def record(self, *args, **kwargs):
        found.append({path.name for path in checkpoints.glob("checkpoint-*")})
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", record)
    train(recipe, console)
    assert "Resuming after step 5" in console.file.getvalue()
    assert found[0] == {"checkpoint-5"}
    assert not part.exists()


def limited(recipe, max_file_size):
    """Train with a limit on the file size: writes fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    owl2("train", recipe)


@pytest.mark.parametrize(
    ("max_file_size", "changes"),
    [
        (150_000, {}),  # less than the optimizer state, which torch writes
        (20_000, {}),  # less than the weights, which safetensors writes
        (9000, {"save_steps": None, "logging_steps": 1, "max_steps": 90}),  # less than the log
    ],
)
def test_full_disk_is_reported(settings, tmp_path, max_file_size, changes):
    recipe = write_recipe(tmp_path, settings | {"max_steps": 6} | changes)
    processes = start(tmp_path / "output", limited, recipe, max_file_size)
    assert processes.wait() == [2], processes.output()
    output = processes.output()
    assert str(tmp_path / "run") in output and "GB are free on that disk" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk with space for one checkpoint, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting is not permitted here")
    yield disk
    os.system(f"umount {disk}")


def test_full_disk_keeps_the_last_checkpoint_and_the_run_is_resumed(settings, tmp_path, small_disk):
    settings = settings | {"output": str(small_disk / "run"), "max_steps": 9}
    recipe = write_recipe(tmp_path, settings)
    checkpoints = small_disk / "run" / "checkpoints"
    processes = start(tmp_path / "output", owl2, "train", recipe)
    assert processes.wait() == [2], processes.output()
    assert "0.00 GB are free on that disk" in processes.output()
    assert latest(checkpoints) == "checkpoint-3"
    os.system(f"mount -o remount,size=9m {small_disk}")
    processes = run(tmp_path / "output2", owl2, "train", recipe)
    assert "Resuming after step 3" in processes.output()
    uninterrupted = train(Recipe(**settings | {"output": str(tmp_path / "uninterrupted")}), quiet())
    assert_same_model(uninterrupted.model, small_disk / "run" / "model")


# Like a job scheduler: to all processes of a job, data loader workers included.
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_sigterm_saves_a_checkpoint_and_exits_with_143(settings, tmp_path, workers):
    changes = {"save_steps": None, "max_steps": 2000, "dataloader_num_workers": workers}
    command = ("train", write_recipe(tmp_path, settings | changes))
    processes = start(tmp_path / "output", owl2, *command)
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes(), processes.output)
    main = psutil.Process(processes.members[0].pid)
    job = [main, *main.children(recursive=True)]
    assert len(job) >= 1 + workers  # and the resource tracker
    for member in job:
        member.terminate()
    assert processes.wait() == [143]
    assert "run the same command to resume" in processes.output()
    state = latest(tmp_path / "run" / "checkpoints")
    step = read_jsonl(log)[-1]["step"]
    assert state == f"checkpoint-{step}"
