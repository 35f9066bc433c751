"""What tests of whole runs share: a silent console, weights to compare, Ctrl-C at a step."""

import io
import os
import signal

import torch
from rich.console import Console

from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.trainer import Owl2Trainer


def quiet():
    return Console(file=io.StringIO(), width=120)


def weights(directory):
    model = Owl2ForConditionalGeneration.from_pretrained(directory)
    return model.state_dict()


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def interrupt_at(monkeypatch, step):
    """Ctrl-C while this step is being computed."""
    compute = Owl2Trainer.training_step
    pressed = False

    def computing(self, *args, **kwargs):
        nonlocal pressed
        if self.state.global_step + 1 == step and not pressed:
            pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", computing)
