"""What tests of evaluation share: an engine, and a task whose right answers are known."""

import io

import pytest
from PIL import Image
from rich.console import Console

from owl2.eval.scoring import EXACT_MATCH
from owl2.eval.tasks import TASKS, Question, Task
from owl2.inference.engine import Engine

COLOURS = ("red", "blue", "lime", "white", "black", "yellow")
COUNT = 20
LIMIT = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="session")
def engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (10, 12), colour).save(folder / f"{colour}.png")
    return folder


@pytest.fixture(scope="session")
def questions(engine, pictures):
    """Of different lengths. The odd ones expect what the model says, so half of it is right."""
    made = []
    for number in range(COUNT):
        # Neither sorted by length nor all different.
        words = "is it a " + "very " * (number * 7 % 4) + f"{COLOURS[number % 5]} one?"
        picture = {"type": "image", "path": str(pictures / f"{COLOURS[number % 6]}.png")}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": words}]}]
        said = engine.chat(messages, **LIMIT)
        expected = ("neither", said) if number % 2 else (f"not {said}",)
        kind = "first" if number < 5 else "later"
        made.append(Question(f"made#{number}", words, messages, expected, kind))
    return made


@pytest.fixture
def task(questions, monkeypatch):
    made = Task("made", lambda prompt: questions, "{question}", EXACT_MATCH, 4)
    monkeypatch.setitem(TASKS, "made", made)
    return made


@pytest.fixture
def plain():
    """A console that is no terminal, as a log file is none."""
    return Console(file=io.StringIO(), width=80)
