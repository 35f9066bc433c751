"""What tests of `owl2 caption` share: a folder, settings, and an engine without a model."""

import io
import json
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from owl2.caption import command
from owl2.caption.command import Settings, caption
from owl2.errors import InputError
from tests.engine.conftest import image

NAMES = ["a.png", "b/1.jpg", "b/2.PNG", "c.webp", "d.png"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        image(number, size=(20, 12)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_text("macOS leaves such")
    (folder / ".git").mkdir()
    image(1).save(folder / ".git" / "x.png")
    return folder


@pytest.fixture
def settings(folder, tmp_path, tiny_checkpoint):
    return Settings(
        folder,
        str(tiny_checkpoint),
        tmp_path / "out" / "captions.jsonl",
        recursive=True,
        max_new_tokens=6,
        batch_size=2,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture
def stub(monkeypatch):
    """An engine without a model: an image's caption is its name, and "bad" in it an error."""
    state = SimpleNamespace(asked=[], seconds=0.0)

    def answers(settings, paths, engine):
        for path in paths:
            time.sleep(state.seconds)
            state.asked.append(path.relative_to(settings.folder).as_posix())
            yield InputError("broken") if "bad" in path.name else f"a {path.name}"

    monkeypatch.setattr(command, "_by_engine", answers)
    monkeypatch.setattr(command, "_load", lambda *_: None)
    return state


def run(settings):
    console = Console(file=io.StringIO(), width=200)
    caption(settings, console)
    return console.file.getvalue()


def rows(settings):
    return [json.loads(line) for line in settings.output.read_text("utf-8").split("\n")[:-1]]


def report(settings):
    return json.loads(settings.output.with_name("captions.report.json").read_text("utf-8"))


def files(settings):
    return sorted(file.name for file in settings.output.parent.iterdir())


def changed(settings, **values):
    return Settings(**{**settings.__dict__, **values})


DONE = ["captions.jsonl", "captions.report.json"]
