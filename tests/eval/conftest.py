"""Shared by the tests of evaluation: an engine, and a task whose correct answers are known."""

import io
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.eval import evaluate, listing, tasks
from owl2.eval.evaluate import EvalConfig
from owl2.eval.samples import EvalSample
from owl2.eval.task_config import DataFiles, TaskConfig, task_configs
from owl2.eval.tasks import EvalTask

COLORS = ("red", "blue", "lime", "white", "black", "yellow")
COUNT = 20
LIMIT = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="session", autouse=True)
def skip_environment_report():
    """lm-eval adds a report of the machine to each result, which takes a second of `pip` etc."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
        yield


@pytest.fixture(scope="session")
def engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for color in COLORS:
        Image.new("RGB", (10, 12), color).save(folder / f"{color}.png")
    return folder


@pytest.fixture(scope="session")
def questions(engine, images):
    """Samples of several lengths; the expected answers of the odd ones include the response."""
    samples = []
    for number in range(COUNT):
        # Not sorted by length, and with repetitions.
        text = "is it a " + "very " * (number * 7 % 4) + f"{COLORS[number % 5]} one?"
        image = {"type": "image", "path": str(images / f"{COLORS[number % 6]}.png")}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
        response = engine.chat(messages, **LIMIT)
        expected = ("neither", response) if number % 2 else (f"not {response}",)
        category = "first" if number < 5 else "later"
        samples.append(EvalSample(f"tiny#{number}", text, messages, expected, category))
    return samples


@pytest.fixture
def samples(questions):
    """What the reader of the task `tiny` yields; a test may change the list."""
    return list(questions)


@pytest.fixture
def task(samples, monkeypatch):
    """The task `tiny`, in addition to the existing ones."""
    config = TaskConfig(
        title="Tiny",
        suite=None,
        metric="text.EXACT",
        max_new_tokens=4,
        scale=100,
        data=DataFiles(files=[], origin="here", license="none"),
    )
    read = tasks.read_samples
    monkeypatch.setattr(
        tasks,
        "read_samples",
        lambda own, data: iter(samples) if own.title == "Tiny" else read(own, data),
    )
    for module in (tasks, listing):
        monkeypatch.setattr(module, "task_configs", lambda: {**task_configs(), "tiny": config})
    return EvalTask("tiny", config)


@pytest.fixture
def plain():
    """A console that is not a terminal, such as a log file."""
    return Console(file=io.StringIO(), width=80, highlight=False)


@pytest.fixture
def config(tiny_checkpoint, task, tmp_path, monkeypatch):
    """Without plots, which take a second each."""
    monkeypatch.setattr(evaluate, "has_matplotlib", lambda: False)
    model_args = ModelArgs(str(tiny_checkpoint), device="cpu", dtype="float32")
    return EvalConfig(model_args, tmp_path / "out", task.name, batch_size=6)


@pytest.fixture
def baseline(config):
    return replace(config, no_image_baseline=True)
