"""What tests of evaluation share: an engine, and a task whose right answers are known."""

import io
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from owl2.engine.engine import Engine
from owl2.eval import listing, tasks
from owl2.eval.samples import Question
from owl2.eval.task_config import Data, Recipe, recipes
from owl2.eval.tasks import Task

COLOURS = ("red", "blue", "lime", "white", "black", "yellow")
COUNT = 20
LIMIT = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="session")
def engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for colour in COLOURS:
        Image.new("RGB", (10, 12), colour).save(folder / f"{colour}.png")
    return folder


@pytest.fixture(scope="session")
def questions(engine, images):
    """Of different lengths. The odd ones expect what the model says, so half of it is right."""
    made = []
    for number in range(COUNT):
        # Neither sorted by length nor all different.
        words = "is it a " + "very " * (number * 7 % 4) + f"{COLOURS[number % 5]} one?"
        image = {"type": "image", "path": str(images / f"{COLOURS[number % 6]}.png")}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": words}]}]
        said = engine.chat(messages, **LIMIT)
        expected = ("neither", said) if number % 2 else (f"not {said}",)
        kind = "first" if number < 5 else "later"
        made.append(Question(f"made#{number}", words, messages, expected, kind))
    return made


@pytest.fixture
def samples(questions):
    """What the made task's reader yields; a test may change the list."""
    return list(questions)


@pytest.fixture
def task(samples, monkeypatch):
    """One more task, `made`, beside those that there are."""
    recipe = Recipe(
        title="Made",
        suite=None,
        reader="made.samples",
        metric="exact.MATCH",
        max_new_tokens=4,
        scale=100,
        data=Data(files=[], origin="here", licence="none"),
    )
    reader = SimpleNamespace(samples=lambda source: iter(samples))
    monkeypatch.setitem(sys.modules, "owl2.eval.readers.made", reader)
    for module in (tasks, listing):
        monkeypatch.setattr(module, "recipes", lambda: {**recipes(), "made": recipe})
    return Task.of("made", recipe)


@pytest.fixture
def plain():
    """A console that is no terminal, as a log file is none."""
    return Console(file=io.StringIO(), width=80)
