import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from owl2 import cli
from owl2.errors import InputError
from owl2.eval import runner
from owl2.eval.runner import Settings, evaluate
from owl2.inference.engine import Engine


@pytest.fixture
def settings(tiny_checkpoint, tmp_path):
    return Settings(
        str(tiny_checkpoint), "easy_vqa", tmp_path / "out", batch_size=8, limit=12, prompt="short"
    )


@pytest.fixture
def run():
    def evaluated(settings):
        shown = io.StringIO()
        results = evaluate(settings, Console(file=shown, width=100))
        return results, shown.getvalue()

    return evaluated


def answers(settings, name="easy_vqa"):
    lines = (settings.output / "answers" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_results_and_every_answer(settings, run):
    results, shown = run(settings)
    assert json.loads((settings.output / "results.json").read_text()) == results
    task = results["tasks"]["easy_vqa"]
    rows, blind = answers(settings), answers(settings, "easy_vqa_blind")
    assert results["model"] == settings.model
    assert task["n"] == len(rows) == len(blind) == 12
    for metric, those in (("accuracy", rows), ("accuracy_blind", blind)):
        assert type(task["metrics"][metric]) is float
        assert task["metrics"][metric] == sum(row["correct"] for row in those) / 12
    assert sum(kind["n"] for kind in task["by_answer_kind"].values()) == 12
    assert task["prompt"] == "{question}"
    assert task["scorer"] == {"name": "exact_match", "version": "1"}
    assert task["preprocessing"]["size"] == 8
    assert {"owl2", "torch", "transformers"} <= task["versions"].keys()
    assert rows[0]["prompt"] == f"USER: <|image|>{rows[0]['question']} ASSISTANT:"
    assert blind[0]["prompt"] == f"USER: {rows[0]['question']} ASSISTANT:"
    assert [row["id"] for row in rows] == [f"easy_vqa/test#{number}" for number in range(12)]
    assert not list(settings.output.rglob("*.part*"))
    assert "results.json" in shown


def test_answers_are_those_of_one_by_one(settings, run, tiny_checkpoint):
    run(settings)
    together = answers(settings)
    run(replace(settings, batch_size=1))
    assert answers(settings) == together
    engine = Engine.from_pretrained(tiny_checkpoint)
    task = runner.find_tasks("easy_vqa")[0]
    alone = [
        engine.chat(question.messages, max_new_tokens=10, do_sample=False)
        for question in task.read("{question}")[:12]
    ]
    assert [row["answer"] for row in together] == alone
    assert len(set(alone)) > 1  # else a mix-up would not be seen


def test_a_model_that_knows_the_answers_has_them_all_right(settings, run, monkeypatch):
    known = {
        tuple(part["text"] for part in question.messages[0]["content"] if "text" in part): question
        for question in runner.find_tasks("easy_vqa")[0].read("{question}")[:12]
    }

    def batch(self, conversations, **options):
        for messages in conversations:
            parts = messages[0]["content"]
            [right] = known[tuple(part["text"] for part in parts if "text" in part)].expected
            # Blind, it does not know.
            yield right if any(part["type"] == "image" for part in parts) else "perhaps"

    monkeypatch.setattr(Engine, "batch", lambda *args, **options: list(batch(*args, **options)))
    results, shown = run(settings)
    assert results["tasks"]["easy_vqa"]["metrics"] == {"accuracy": 1.0, "accuracy_blind": 0.0}
    assert "100.00%" in shown


def test_not_blind(settings, run):
    run(settings)
    results, _ = run(replace(settings, blind=False))
    assert results["tasks"]["easy_vqa"]["metrics"].keys() == {"accuracy"}
    assert not (settings.output / "answers" / "easy_vqa_blind.jsonl").exists()


def test_stopped_half_way_keeps_the_answers_so_far_and_the_older_scores(settings, run, monkeypatch):
    run(settings)
    older = (settings.output / "results.json").read_text()
    batch, calls = Engine.batch, []

    def stops(self, conversations, **options):
        calls.append(len(conversations))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(self, conversations, **options)

    monkeypatch.setattr(Engine, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    part = settings.output / "answers" / "easy_vqa.part.jsonl"
    assert len(part.read_text().splitlines()) == calls[0] == 8
    assert (settings.output / "results.json").read_text() == older


def test_the_report_shows_pictures(settings, run):
    run(settings)
    with Image.open(settings.output / "report.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    # easy-VQA's backgrounds are white with a tint, its shapes mostly coloured; a page without
    # pictures is white and has black letters.
    tinted = (np.ptp(pixels, axis=2) > 5).mean()
    assert tinted > 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "easy_vq"}, "Do you mean 'easy_vqa'"),
        ({"batch_size": 0}, "1 or more"),
        ({"limit": 0}, "1 or more"),
        ({"prompt": "no place"}, "question"),
        ({"model": "/nowhere"}, "nowhere"),
    ],
)
def test_what_is_refused(settings, run, change, message):
    with pytest.raises(InputError, match=message):
        run(replace(settings, **change))
    assert not (settings.output / "results.json").exists()


def test_the_command(settings, monkeypatch, capfd):
    settings.output.write_text("in the way")
    words = ["owl2", "eval", "--model", settings.model, "--tasks", "easy_vqa"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(settings.output)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert "is a file; move it away" in error
    assert "Traceback" not in error
    settings.output.unlink()
    options = ["--limit", "3", "--prompt", "short", "--no-blind", "--output", str(settings.output)]
    monkeypatch.setattr(sys, "argv", words + options)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert len(answers(settings)) == 3
