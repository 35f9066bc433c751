"""Shared by the tests of `owl2 caption`: a folder, its options, and an engine without a model."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from owl2.caption import command
from owl2.caption.command import CaptionConfig, caption
from owl2.engine.load_model import ModelArgs
from owl2.engine.output import CompletionChunk
from owl2.errors import ErrorCode, InputError
from tests.engine.conftest import random_image

NAMES = ["a.png", "b/1.jpg", "b/2.PNG", "c.webp", "d.png"]
DONE = ["captions.jsonl", "captions.report.json"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        random_image(number, size=(20, 12)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._a.png").write_text("a file of macOS")
    (folder / ".git").mkdir()
    random_image(1).save(folder / ".git" / "x.png")
    return folder


@pytest.fixture
def config(folder, tmp_path, tiny_checkpoint):
    return CaptionConfig(
        folder,
        ModelArgs(str(tiny_checkpoint), device="cpu", dtype="float32"),
        tmp_path / "out" / "captions.jsonl",
        recursive=True,
        max_new_tokens=6,
        batch_size=2,
    )


@pytest.fixture
def stub(monkeypatch, folder):
    """An engine without a model: the caption is the file name; names with "bad" are errors."""
    state = SimpleNamespace(asked=[], before_each=lambda name: None)
    state.answer = lambda path: f"a {path.name}"

    def output_all(engine, conversations, batch_size, **options):
        for messages in conversations:
            path = messages[0]["content"][0]["image"]
            name = path.relative_to(folder).as_posix()
            state.before_each(name)
            state.asked.append(name)
            if "bad" in path.name:
                yield InputError("broken", ErrorCode.BROKEN_IMAGE)
                continue
            try:
                yield CompletionChunk(0, state.answer(path), (), 1, "stop")
            except InputError as error:
                yield error

    monkeypatch.setattr(command, "output_all", output_all)
    monkeypatch.setattr(command, "load_engine", lambda *_: None)
    return state


def run(config, **changes):
    console = Console(file=io.StringIO(), width=200, highlight=False)
    caption(replace(config, **changes), console)
    return console.file.getvalue()


def rows(config):
    return [json.loads(line) for line in config.output.read_text("utf-8").split("\n")[:-1]]


def report(config):
    return json.loads(config.records.report.read_text("utf-8"))


def files(config):
    return sorted(file.name for file in config.output.parent.iterdir())
