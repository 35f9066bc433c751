"""Helpers for tests of runs: a silent console, weights and logs to compare, Ctrl-C at a step."""

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from owl2.checkpoints.weight_names import released_name
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer

LORA = {"r": 2, "lora_alpha": 4.0}


class SilentConsole(Console):
    """Renders nothing: tables take a tenth of a short run."""

    def print(self, *objects, **options):
        pass


def quiet():
    return SilentConsole(file=io.StringIO())


def recorded():
    """A console whose output is `file.getvalue()`."""
    return Console(file=io.StringIO(), width=120)


def load_model(folder, **options):
    return Owl2ForConditionalGeneration.from_pretrained(folder, **options).eval()


def ask(question, image=None):
    """A conversation with one question."""
    parts = [] if image is None else [{"type": "image", "path": str(image)}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def trainable_names(model):
    """The names of the trainable parameters, with both names of tied weights."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.requires_grad}


def weights(directory):
    """The tensors of a model file, or of an adapter and its base model, by released names."""
    file = Path(directory) / "model.safetensors"
    return load_file(file) if file.exists() else released_state(load_model(directory))


def released_state(model):
    """The state dict of a model by released names."""
    return {released_name(name): tensor for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def read_jsonl(path):
    """The lines of a log; none if the file does not exist yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_recipe(folder, settings):
    """Write a recipe file, by default of a run in `folder`; returns its path."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"output": str(folder / "run")} | settings), encoding="utf-8")
    return str(path)


def held_out_of(world, **settings):
    """The `validation` of a recipe."""
    return {"data": [{"file": str(world / "data.json")}], "num_generations": 1} | settings


def wait_for(condition, describe=lambda: "", seconds=120, interval=0.005):
    """Poll until a condition on files of another process is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timeout\n{describe()}"
        time.sleep(interval)


class Killed(BaseException):
    """Raised in place of a kill: no handler of the program catches it."""


def kill_at(monkeypatch, step):
    """End the run without any cleanup after this step."""
    training_step = Owl2Trainer.training_step

    def killed_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", killed_step)


def train_until(step, recipe):
    """Train, and send SIGINT while this step is computed."""
    training_step = Owl2Trainer.training_step
    sent = False

    def interrupted_step(self, *args, **kwargs):
        nonlocal sent
        if self.state.global_step + 1 == step and not sent:
            sent = True
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Owl2Trainer, "training_step", interrupted_step)
        return train(recipe, quiet())
