"""A whole evaluation: what it writes, and what it leaves alone when it is stopped."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from owl2.errors import InputError
from owl2.eval.runner import Settings, evaluate
from owl2.eval.tasks import without_pictures
from owl2.inference.engine import Engine
from owl2.inference.loading import choose_dtype


@pytest.fixture
def settings(tiny_checkpoint, task, tmp_path):
    return Settings(str(tiny_checkpoint), task.name, tmp_path / "out", batch_size=6, device="cpu")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results(settings, plain, engine, questions):
    results = evaluate(settings, plain)
    assert json.loads((settings.output / "results.json").read_text(encoding="utf-8")) == results
    assert results["model"] == settings.model
    result = results["tasks"]["made"]
    blind = [
        engine.chat(without_pictures(question.messages), max_new_tokens=4) in question.expected
        for question in questions
    ]
    assert result["metrics"] == {"accuracy": 0.5, "accuracy_blind": sum(blind) / len(blind)}
    assert result["metrics"]["accuracy_blind"] < 0.5
    assert result["n"] == len(questions)
    first, later = result["by_answer_kind"]["first"], result["by_answer_kind"]["later"]
    assert (first["n"], first["accuracy"]) == (5, 2 / 5)
    assert (later["n"], later["accuracy"]) == (15, 8 / 15)
    assert first["accuracy_blind"] == sum(blind[:5]) / 5
    assert result["prompt"] == "{question}"
    assert result["preprocessing"]["size"] == 8
    assert result["preprocessing"]["policy"] == "resize"
    assert result["decoding"]["do_sample"] is False
    assert result["decoding"]["max_new_tokens"] == 4
    assert result["decoding"]["batch_size"] == 6
    chosen = choose_dtype(torch.device("cpu"))
    assert result["decoding"]["dtype"] == str(chosen).removeprefix("torch.")
    assert result["scorer"] == {"name": "exact_match", "version": "1"}
    assert result["versions"]["torch"] == torch.__version__
    assert result["seconds"] > 0
    assert result["samples_per_second"] == pytest.approx(len(questions) / result["seconds"])


def test_files(settings, plain, questions):
    evaluate(settings, plain)
    assert files(settings.output) == {
        "results.json",
        "report.png",
        "answers/made.jsonl",
        "answers/made_blind.jsonl",
    }
    for name, start in (("made", "USER: <|image|>is it"), ("made_blind", "USER: is it")):
        lines = rows(settings.output / "answers" / f"{name}.jsonl")
        assert [line["id"] for line in lines] == [question.id for question in questions]
        assert all(line["prompt"].startswith(start) for line in lines)
    text = plain.file.getvalue()
    for words in ("50.00%", "blind", "first", "made         ", "20/20", "results.json", "left"):
        assert words in text, text
    assert "\x1b" not in text


def test_twice_is_the_same_and_no_blind_leaves_no_blind_answers(settings, plain):
    evaluate(settings, plain)
    before = (settings.output / "answers" / "made.jsonl").read_bytes()
    results = evaluate(dataclasses.replace(settings, blind=False, batch_size=1), plain)
    assert (settings.output / "answers" / "made.jsonl").read_bytes() == before
    assert results["tasks"]["made"]["metrics"] == {"accuracy": 0.5}
    assert "seconds_blind" not in results["tasks"]["made"]
    assert files(settings.output) == {"results.json", "report.png", "answers/made.jsonl"}


def test_a_checkpoint_that_samples_is_evaluated_greedily(settings, plain, monkeypatch):
    load = Engine.from_pretrained

    def sampling(*arguments):
        engine = load(*arguments)
        engine.model.generation_config.do_sample = True
        engine.model.generation_config.temperature = 5.0
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", sampling)
    results = evaluate(dataclasses.replace(settings, blind=False), plain)
    assert results["tasks"]["made"]["metrics"] == {"accuracy": 0.5}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError])
def test_stopped_half_way(settings, plain, monkeypatch, stop):
    evaluate(settings, plain)
    before = {name: (settings.output / name).read_bytes() for name in files(settings.output)}
    batch, calls = Engine.batch, []

    def stopping(self, conversations, **options):
        calls.append(len(conversations))
        if len(calls) == 6:  # the second batch of the blind round
            raise stop("stop")
        return batch(self, conversations, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "batch", stopping)
        with pytest.raises(stop):
            evaluate(settings, plain)
    answers = settings.output / "answers"
    assert len(rows(answers / "made.part.jsonl")) == 20, "nothing that was answered is lost"
    assert len(rows(answers / "made_blind.part.jsonl")) == 6
    assert before == {name: (settings.output / name).read_bytes() for name in before}
    if stop is KeyboardInterrupt:
        assert "Stopped; the answers so far are in" in plain.file.getvalue()

    evaluate(dataclasses.replace(settings, blind=False), plain)
    assert files(settings.output) == {"results.json", "report.png", "answers/made.jsonl"}


def test_report_shows_the_pictures(settings, plain):
    evaluate(dataclasses.replace(settings, blind=False, limit=4), plain)
    with Image.open(settings.output / "report.png") as report:
        colours = np.asarray(report.convert("RGB")).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0)):
        share = (colours == colour).all(1).mean()
        assert 0.05 < share < 0.3, (colour, share)
    for words in ((0, 128, 0), (220, 20, 60)):  # green: right, crimson: wrong
        assert (colours == words).all(1).sum() > 50, words


def test_without_matplotlib(settings, plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate(settings, plain)
    assert "pip install 'mplug-owl2[plot]'" in plain.file.getvalue()
    assert "results.json" in files(settings.output)


def test_wrong_settings_leave_nothing_behind(settings, plain, tmp_path):
    (tmp_path / "file").write_text("")
    for changes, words in (
        ({"tasks": "mad"}, "'made'"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"model": str(tmp_path / "file")}, "file"),
        ({"output": tmp_path / "file"}, "is a file"),
        ({"output": tmp_path / "file" / "out"}, "is a file"),
        ({"batch_size": 0}, "1 or more"),
        ({"limit": 0}, "1 or more"),
        ({"device": "abacus"}, "abacus"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(dataclasses.replace(settings, **changes), plain)
    assert files(tmp_path) == {"file"}
    assert not settings.output.exists()
