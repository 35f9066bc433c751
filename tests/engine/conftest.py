"""What tests of answering share: an engine, images, and conversations of many kinds."""

import copy

import pytest
import torch
from PIL import Image

from owl2.engine.engine import Engine
from owl2.engine.model_runner import ModelRunner


@pytest.fixture(scope="session")
def shared_engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def engine(shared_engine):
    """One that a test may change."""
    return Engine(copy.deepcopy(shared_engine.model), shared_engine.processor)


@pytest.fixture
def broken(engine):
    """An engine whose model gives NaN."""
    with torch.no_grad():
        engine.model.lm_head.weight[5, 0] = float("nan")
    return engine


@pytest.fixture
def steps(monkeypatch):
    """How many sequences each step of any model takes on, as a list that grows."""
    made = []
    step = ModelRunner.decode

    def counted(self, tokens, positions):
        made.append(len(tokens))
        return step(self, tokens, positions)

    monkeypatch.setattr(ModelRunner, "decode", counted)
    return made


def image(number, size=(10, 12)):
    colours = torch.Generator().manual_seed(number)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=colours, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def ask(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="session")
def conversations():
    """12, of 0, 1 and 2 images and different lengths; some with earlier rounds."""
    texts = ["what is this?", "is it red? " * 4, "no", "a blue circle and a green one, 你好"]
    made = [ask(text, *map(image, range(count))) for text in texts for count in (0, 1, 2)]
    made[1] = [*made[1], {"role": "assistant", "content": "red"}, *ask("and now?", image(7))]
    made[6] = [*made[6], {"role": "assistant", "content": "a circle"}, *ask("what colour?")]
    return made


@pytest.fixture
def three_threads(monkeypatch):
    """Kernels with more threads than `make test` has, also for little work."""
    monkeypatch.setattr("owl2.engine.backends.native.ops.ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
