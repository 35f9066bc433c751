"""A whole evaluation: what it writes, and what it leaves alone when it is stopped."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval import evaluate as evaluate_module
from owl2.eval import plots
from owl2.eval.evaluate import Judge, Settings, evaluate
from owl2.eval.model_args import Subject
from owl2.eval.samples import Broken
from owl2.eval.sharding import Team
from owl2.eval.tasks import without_images

REPORTS = {"report.md", "report.html"}


@pytest.fixture
def settings(tiny_checkpoint, task, tmp_path, monkeypatch):
    """Without plots, which take a second each."""
    monkeypatch.setattr(evaluate_module, "has_matplotlib", lambda: False)
    subject = Subject(str(tiny_checkpoint), device="cpu", dtype="float32")
    return Settings(subject, tmp_path / "out", task.name, batch_size=6)


@pytest.fixture
def both(settings):
    return replace(settings, blind=True)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results(both, plain, engine, questions):
    results = evaluate(both, plain)
    assert json.loads((both.output / "results.json").read_text(encoding="utf-8")) == results
    assert results["model"] == both.subject.model
    assert results["skipped"] == {}
    assert results["machine"]["batch_size"] == 6
    assert results["machine"]["processes"] == 1
    result = results["tasks"]["made"]
    blind = [
        engine.chat(without_images(question.messages), max_new_tokens=4) in question.expected
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
    assert result["decoding"]["mam"] is True
    assert result["decoding"]["dtype"] == "float32"
    assert result["scorer"] == {"name": "exact_match", "version": "1"}
    assert result["versions"]["torch"] == torch.__version__
    assert result["broken"] == {"n": 0, "first": []}
    assert result["seconds"] > 0
    assert result["samples_per_second"] == pytest.approx(len(questions) / result["seconds"])


def test_fingerprints_tell_weights_questions_and_images_apart(
    settings, plain, samples, questions, images, tmp_path, monkeypatch
):
    def prints(results):
        data = results["tasks"]["made"]["data"]
        return results["fingerprint"], data["questions"], data["images"]

    before = prints(evaluate(settings, plain))
    assert prints(evaluate(settings, plain)) == before
    samples[0] = replace(questions[0], expected=("something",))
    assert prints(evaluate(settings, plain))[::2] == before[::2]
    assert prints(evaluate(settings, plain))[1] != before[1]
    words = questions[0].messages[0]["content"][1]
    image = {"type": "image", "path": str(images / "black.png")}
    samples[0] = replace(questions[0], messages=[{"role": "user", "content": [image, words]}])
    after = prints(evaluate(settings, plain))
    assert after[:2] == before[:2]
    assert after[2] != before[2]

    load = evaluate_module.Subject.load

    def trained(self, team):
        engine = load(self, team)
        with torch.no_grad():
            engine.model.lm_head.weight += 0.01
        return engine

    monkeypatch.setattr(evaluate_module.Subject, "load", trained)
    assert prints(evaluate(settings, plain))[0] != before[0]


def test_files(both, plain, questions):
    evaluate(both, plain)
    assert files(both.output) == {
        "results.json",
        *REPORTS,
        "answers/made.jsonl",
        "answers/made_blind.jsonl",
    }
    for name, start in (("made", "USER: <|image|>is it"), ("made_blind", "USER: is it")):
        lines = rows(both.output / "answers" / f"{name}.jsonl")
        assert [line["id"] for line in lines] == [question.id for question in questions]
        assert all(line["prompt"].startswith(start) for line in lines)
    [line] = [row for row in rows(both.output / "answers/made.jsonl") if row["id"] == "made#3"]
    assert line == {
        "id": "made#3",
        "question": questions[3].text,
        "kind": "first",
        "images": [questions[3].messages[0]["content"][0]["path"]],
        "prompt": f"USER: <|image|>{questions[3].text} ASSISTANT:",
        "expected": list(questions[3].expected),
        "facts": {},
        "answer": questions[3].expected[1],
        "score": 1.0,
    }
    text = plain.file.getvalue()
    for words in ("50.00%", "blind", "first", "made ", "20/20", "results.json", "left"):
        assert words in text, text
    assert "\x1b" not in text


def test_twice_is_the_same_and_no_blind_leaves_no_blind_answers(both, plain):
    evaluate(both, plain)
    before = (both.output / "answers" / "made.jsonl").read_bytes()
    results = evaluate(replace(both, blind=False, batch_size=1), plain)
    assert (both.output / "answers" / "made.jsonl").read_bytes() == before
    assert results["tasks"]["made"]["metrics"] == {"accuracy": 0.5}
    assert "seconds_blind" not in results["tasks"]["made"]
    assert files(both.output) == {"results.json", *REPORTS, "answers/made.jsonl"}


def test_a_checkpoint_that_samples_is_evaluated_greedily(settings, plain, monkeypatch):
    load = Subject.load

    def sampling(self, team):
        engine = load(self, team)
        engine.model.generation_config.do_sample = True
        engine.model.generation_config.temperature = 5.0
        return engine

    monkeypatch.setattr(Subject, "load", sampling)
    assert evaluate(settings, plain)["tasks"]["made"]["metrics"] == {"accuracy": 0.5}


def test_stopped_half_way_and_started_again(both, plain, monkeypatch):
    whole = evaluate(both, plain)
    before = {name: (both.output / name).read_bytes() for name in files(both.output)}
    batch, calls = Engine.batch, []

    def stopping(self, conversations, **options):
        calls.append(len(conversations))
        if len(calls) == 6:  # the second batch of the blind round
            raise KeyboardInterrupt
        return batch(self, conversations, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(both, plain)
    answers = both.output / "answers"
    assert len(rows(answers / "made.part.jsonl")) == 1 + 20, "nothing that was answered is lost"
    assert len(rows(answers / "made_blind.part.jsonl")) == 1 + 6
    assert before == {name: (both.output / name).read_bytes() for name in before}
    assert "Stopped; the answers so far are in" in plain.file.getvalue()

    calls.clear()
    monkeypatch.setattr(Engine, "batch", lambda *a, **o: calls.append(len(a[1])) or batch(*a, **o))
    again = evaluate(both, plain)
    assert sum(calls) == 14, "only what was left of the blind round"
    assert again["tasks"]["made"]["metrics"] == whole["tasks"]["made"]["metrics"]
    for name in ("answers/made.jsonl", "answers/made_blind.jsonl"):
        assert (both.output / name).read_bytes() == before[name]
    assert files(both.output) == set(before)


def test_other_settings_do_not_go_on_from_there(settings, plain, monkeypatch):
    batch = Engine.batch

    def stopping(self, conversations, **options):
        raise KeyboardInterrupt

    journal = settings.output / "answers" / "made.part.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings, plain)
    head = journal.read_text()
    calls = []
    monkeypatch.setattr(Engine, "batch", lambda *a, **o: calls.append(len(a[1])) or batch(*a, **o))
    journal.write_text(head)
    evaluate(replace(settings, subject=replace(settings.subject, image_policy="pad")), plain)
    assert sum(calls) == 20


def test_two_processes_give_what_one_gives(settings, plain, tmp_path):
    one = evaluate(settings, plain)
    together = replace(settings, output=tmp_path / "two")
    assert evaluate(together, plain, Team(1, 2)) == {}
    two = evaluate(together, plain, Team(0, 2))
    assert two["tasks"]["made"]["metrics"] == one["tasks"]["made"]["metrics"]
    assert two["machine"]["processes"] == 2
    answers = "answers/made.jsonl"
    assert (together.output / answers).read_bytes() == (settings.output / answers).read_bytes()
    assert files(together.output) == files(settings.output)


def test_only_the_first_process_scores(settings, plain):
    assert evaluate(settings, plain, Team(1, 2)) == {}
    assert files(settings.output) == {"answers/made.part-1.jsonl", "answers/process-1.alive"}


def test_broken_samples_are_counted_named_and_shown(settings, plain, samples, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG no")
    words = {"type": "text", "text": "What?"}
    torn = {"type": "image", "path": str(tmp_path / "torn.png")}
    samples[1] = replace(samples[1], messages=[{"role": "user", "content": [torn, words]}])
    samples.append(Broken("made#20", "the image x.png is not there"))
    samples.append(samples[2])
    result = evaluate(settings, plain)["tasks"]["made"]
    assert result["n"] == 19
    assert result["metrics"]["accuracy"] == pytest.approx(9 / 19)
    assert result["broken"]["n"] == 3
    broken = {item["id"]: item["reason"] for item in result["broken"]["first"]}
    assert broken["made#20"] == "the image x.png is not there"
    assert "same id" in broken["made#2"]
    assert "torn.png" in broken["made#1"]
    assert {row["id"] for row in rows(settings.output / "answers/made.broken.jsonl")} == {*broken}
    assert "3 could not be asked" in plain.file.getvalue()
    for name in ("report.md", "report.html"):
        text = (settings.output / name).read_text()
        assert "3 could not be asked" in text
        assert "the image x.png is not there" in text


def test_lines_of_ones_own_file_that_are_none_are_shown_too(settings, plain, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Which?", "answer": "a"}\n{"question": "Which?", "ans\n[1]\n')
    result = evaluate(replace(settings, tasks=str(path)), plain)["tasks"]["mine"]
    assert (result["n"], result["broken"]["n"]) == (1, 2)
    report = (settings.output / "report.md").read_text()
    assert f"{path}, line 2: not JSON" in report
    assert f"{path}, line 3 is [1], not an object" in report


def test_nothing_but_broken_samples_is_an_error(settings, plain, samples):
    samples[:] = [Broken("1", "lost")]
    with pytest.raises(InputError, match=r"no question that can be asked, and 1 broken\. .*lost"):
        evaluate(settings, plain)
    assert not settings.output.exists()


def test_no_answer_at_all_is_an_error(settings, plain, monkeypatch):
    def failing(self, conversations, **options):
        raise InputError("The logits are not finite.")

    monkeypatch.setattr(Engine, "batch", failing)
    with pytest.raises(InputError, match=r"none of its 20 questions .* not finite"):
        evaluate(settings, plain)
    assert "results.json" not in files(settings.output)


def test_a_task_without_its_data_is_left_out_and_named(settings, plain, tmp_path):
    results = evaluate(replace(settings, tasks="made,pope_random", data=tmp_path), plain)
    assert results["tasks"].keys() == {"made"}
    assert "coco_pope_random.json is not there" in results["skipped"]["pope_random"]
    assert "pope_random is left out" in plain.file.getvalue()
    assert "coco_pope_random.json" in (settings.output / "report.md").read_text()


def test_the_judge_is_asked_at_the_end_and_may_fail(settings, plain, task, monkeypatch):
    asked = []

    def away(run, url, model, say):
        asked.append((run, url, model, (run / "results.json").is_file()))
        raise InputError("The server does not answer.")

    monkeypatch.setattr(evaluate_module, "judge_run", away)
    judged = replace(settings, judge=Judge("http://localhost:1/v1", "j"))
    evaluate(judged, plain)
    assert asked == [], "no task here needs one"
    recipe = task.recipe.model_copy(update={"judge": True})
    monkeypatch.setattr(evaluate_module, "find_tasks", lambda *_: [replace(task, recipe=recipe)])
    evaluate(judged, plain)
    assert asked == [(settings.output, "http://localhost:1/v1", "j", True)]
    assert "Not judged: The server does not answer." in plain.file.getvalue()


def test_report_shows_the_images(settings, plain, monkeypatch):
    monkeypatch.setattr(evaluate_module, "has_matplotlib", lambda: True)
    evaluate(replace(settings, limit=4), plain)
    with Image.open(settings.output / "report.png") as report:
        colours = np.asarray(report.convert("RGB")).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0)):
        share = (colours == colour).all(1).mean()
        assert 0.05 < share < 0.3, (colour, share)
    for words in ((0, 128, 0), (220, 20, 60)):  # green: right, crimson: wrong
        assert (colours == words).all(1).sum() > 50, words


def test_without_matplotlib(settings, plain, monkeypatch):
    monkeypatch.setattr(evaluate_module, "has_matplotlib", plots.has_matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate(settings, plain)
    assert "pip install 'owl2-vlm[plot]'" in plain.file.getvalue()
    assert files(settings.output) == {"results.json", *REPORTS, "answers/made.jsonl"}


def test_wrong_settings_leave_nothing_behind(settings, plain, tmp_path):
    (tmp_path / "file").write_text("")
    subject = settings.subject
    for changes, words in (
        ({"tasks": "mad"}, "'made'"),
        ({"tasks": None}, "No task"),
        ({"suite": "papers"}, "'paper'"),
        ({"tasks": "mme"}, "give --data"),
        ({"tasks": str(tmp_path / "mine.jsonl")}, "no file"),
        ({"subject": replace(subject, model=str(tmp_path / "nowhere"))}, "nowhere"),
        ({"subject": replace(subject, model=str(tmp_path / "file"))}, "file"),
        ({"subject": replace(subject, device="abacus")}, "abacus"),
        ({"subject": replace(subject, image_size=9)}, "multiple of the patch"),
        ({"output": tmp_path / "file"}, "is a file"),
        ({"output": tmp_path / "file" / "out"}, "is a file"),
        ({"batch_size": 0}, "1 or more"),
        ({"limit": 0}, "1 or more"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(replace(settings, **changes), plain)
    assert files(tmp_path) == {"file"}
    assert not settings.output.exists()
