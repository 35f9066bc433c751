"""A complete evaluation: the files that it writes, and what is skipped or refused."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.eval import evaluate as evaluate_module
from owl2.eval import report as report_module
from owl2.eval import task_run
from owl2.eval.evaluate import evaluate, load_engine
from owl2.eval.openai_client import ChatEndpoint
from owl2.eval.samples import InvalidEvalSample
from owl2.processing.messages import user_message
from owl2.processing.processor import Owl2Processor
from owl2.workers import WorkerRank
from tests.errors import raises_input_error
from tests.eval.reading import files, rows

REPORTS = {"report.md", "report.html"}


def test_results(baseline, plain, engine, questions):
    results = evaluate(baseline, plain)
    assert json.loads((baseline.output / "results.json").read_text(encoding="utf-8")) == results
    assert results["model"] == baseline.model_args.model
    assert results["skipped"] == {}
    assert results["environment"]["batch_size"] == 6
    assert results["environment"]["processes"] == 1
    result = results["tasks"]["tiny"]
    correct = [
        engine.chat(sample.without_images().messages, max_new_tokens=4) in sample.expected
        for sample in questions
    ]
    assert result["metrics"] == {"accuracy": 0.5, "accuracy_no_image": sum(correct) / len(correct)}
    assert result["metrics"]["accuracy_no_image"] < 0.5
    assert result["n"] == len(questions)
    first, later = result["per_category"]["first"], result["per_category"]["later"]
    assert (first["n"], first["accuracy"]) == (5, 2 / 5)
    assert (later["n"], later["accuracy"]) == (15, 8 / 15)
    assert first["accuracy_no_image"] == sum(correct[:5]) / 5
    assert result["prompt"] == "{question}"
    assert result["preprocessing"]["size"] == 8
    assert result["preprocessing"]["policy"] == "resize"
    assert result["generation"]["do_sample"] is False
    assert result["generation"]["max_new_tokens"] == 4
    assert result["generation"]["mam"] is True
    assert result["generation"]["dtype"] == "float32"
    assert result["metric"] == {"name": "exact_match", "version": "1"}
    assert result["versions"]["torch"] == torch.__version__
    assert result["invalid"] == {"n": 0, "first": []}
    assert result["seconds"] > 0
    assert result["samples_per_second"] == pytest.approx(len(questions) / result["seconds"])


def test_fingerprints_distinguish_weights_samples_and_images(
    config, plain, samples, questions, images, monkeypatch
):
    def fingerprints():
        results = evaluate(config, plain)
        data = results["tasks"]["tiny"]["data"]
        return results["weights_fingerprint"], data["samples"], data["images"]

    before = fingerprints()
    assert fingerprints() == before
    samples[0] = replace(questions[0], expected=("something",))
    other = fingerprints()
    assert other[::2] == before[::2]
    assert other[1] != before[1]
    text = questions[0].messages[0]["content"][1]
    image = {"type": "image", "path": str(images / "black.png")}
    samples[0] = replace(questions[0], messages=[{"role": "user", "content": [image, text]}])
    other = fingerprints()
    assert other[:2] == before[:2]
    assert other[2] != before[2]

    def trained(config, worker):
        engine = load_engine(config, worker)
        with torch.no_grad():
            engine.model.lm_head.weight += 0.01
        return engine

    monkeypatch.setattr(evaluate_module, "load_engine", trained)
    assert fingerprints()[0] != before[0]


def test_files(baseline, plain, questions):
    evaluate(baseline, plain)
    names = {"responses/tiny.jsonl", "responses/tiny_no_image.jsonl"}
    assert files(baseline.output) == {"results.json", *REPORTS, *names}
    for name, start in (("tiny", "USER: <|image|>is it"), ("tiny_no_image", "USER: is it")):
        lines = rows(baseline.responses / f"{name}.jsonl")
        assert [line["id"] for line in lines] == [sample.id for sample in questions]
        assert all(line["prompt"].startswith(start) for line in lines)
    [line] = [row for row in rows(baseline.responses / "tiny.jsonl") if row["id"] == "tiny#3"]
    assert line == {
        "id": "tiny#3",
        "question": questions[3].question,
        "category": "first",
        "images": [questions[3].messages[0]["content"][0]["path"]],
        "prompt": f"USER: <|image|>{questions[3].question} ASSISTANT:",
        "expected": list(questions[3].expected),
        "metadata": {},
        "response": questions[3].expected[1],
        "score": 1.0,
    }
    text = plain.file.getvalue()
    for needle in ("50.00%", "no image", "first", "tiny ", "20/20", "results.json", "left"):
        assert needle in text, text
    assert "\x1b" not in text


def test_second_evaluation_without_baseline_removes_the_old_one(baseline, plain):
    evaluate(baseline, plain)
    before = (baseline.responses / "tiny.jsonl").read_bytes()
    results = evaluate(replace(baseline, no_image_baseline=False, batch_size=1), plain)
    assert (baseline.responses / "tiny.jsonl").read_bytes() == before
    assert results["tasks"]["tiny"]["metrics"] == {"accuracy": 0.5}
    assert "seconds_no_image" not in results["tasks"]["tiny"]
    assert files(baseline.output) == {"results.json", *REPORTS, "responses/tiny.jsonl"}


def test_generation_config_of_the_checkpoint_is_ignored(config, plain, monkeypatch):
    def sampling(config, worker):
        engine = load_engine(config, worker)
        engine.model.generation_config.do_sample = True
        engine.model.generation_config.temperature = 5.0
        return engine

    monkeypatch.setattr(evaluate_module, "load_engine", sampling)
    assert evaluate(config, plain)["tasks"]["tiny"]["metrics"] == {"accuracy": 0.5}


def test_hidden_colors_are_visible_in_evaluation_only(config, plain, monkeypatch):
    """The authors' scripts drop the transparency; other entry points composite on white."""
    engines = []
    load = evaluate_module.load_engine
    monkeypatch.setattr(
        evaluate_module, "load_engine", lambda *args: engines.append(load(*args)) or engines[0]
    )
    evaluate(config, plain)
    images = {
        "hidden red": Image.new("RGBA", (8, 8), (255, 0, 0, 0)),
        "red": Image.new("RGB", (8, 8), (255, 0, 0)),
        "white": Image.new("RGB", (8, 8), (255, 255, 255)),
    }
    for processor, color in (
        (engines[0].processor, "red"),
        (Owl2Processor.from_pretrained(config.model_args.model), "white"),
    ):
        digests = {
            name: processor.encode([user_message("x", [image])]).image_digests
            for name, image in images.items()
        }
        assert digests["hidden red"] == digests[color] and digests["red"] != digests["white"]


def test_two_processes_give_the_results_of_one(config, plain, tmp_path):
    one = evaluate(config, plain)
    shared = replace(config, output=tmp_path / "two")
    assert evaluate(shared, plain, WorkerRank(1, 2)) == {}
    assert files(shared.output) == {"responses/tiny.part-1.jsonl", "responses/process-1.alive"}
    two = evaluate(shared, plain, WorkerRank(0, 2))
    assert two["tasks"]["tiny"]["metrics"] == one["tasks"]["tiny"]["metrics"]
    assert two["environment"]["processes"] == 2
    name = "responses/tiny.jsonl"
    assert (shared.output / name).read_bytes() == (config.output / name).read_bytes()
    assert files(shared.output) == files(config.output)


def test_process_0_waits_only_after_all_tasks(baseline, plain, monkeypatch):
    steps = []
    generate, collect = task_run.TaskRun.generate, task_run.TaskRun.collect

    def record_generate(*args):
        steps.append("generate")
        return generate(*args)

    def record_collect(*args):
        steps.append("collect")
        return collect(*args)

    monkeypatch.setattr(task_run.TaskRun, "generate", record_generate)
    monkeypatch.setattr(task_run.TaskRun, "collect", record_collect)
    evaluate(baseline, plain)
    assert steps == ["generate", "generate", "collect", "collect"]


def test_invalid_samples_are_counted_and_reported(config, plain, samples, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG no")
    text = {"type": "text", "text": "What?"}
    torn = {"type": "image", "path": str(tmp_path / "torn.png")}
    samples[1] = replace(samples[1], messages=[{"role": "user", "content": [torn, text]}])
    samples.append(InvalidEvalSample("tiny#20", "The image x.png does not exist."))
    samples.append(samples[2])
    result = evaluate(config, plain)["tasks"]["tiny"]
    assert result["n"] == 19
    assert result["metrics"]["accuracy"] == pytest.approx(9 / 19)
    assert result["invalid"]["n"] == 3
    invalid = {item["id"]: item["reason"] for item in result["invalid"]["first"]}
    assert "x.png" in invalid["tiny#20"]
    assert "same id" in invalid["tiny#2"]
    assert "torn.png" in invalid["tiny#1"]
    written = rows(config.responses / "tiny.invalid.jsonl")
    assert {row["id"] for row in written} == invalid.keys()
    assert "3 invalid" in plain.file.getvalue()
    for name in REPORTS:
        report = (config.output / name).read_text()
        assert "3 invalid" in report
        assert "x.png" in report


def test_invalid_lines_of_a_custom_file_are_reported(config, plain, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Which?", "answer": "a"}\n{"question": "Which?", "ans\n[1]\n')
    result = evaluate(replace(config, tasks=str(path)), plain)["tasks"]["mine"]
    assert (result["n"], result["invalid"]["n"]) == (1, 2)
    report = (config.output / "report.md").read_text()
    assert f"{path}, line 2" in report
    assert f"{path}, line 3" in report


def test_only_invalid_samples_is_an_error(config, plain, samples):
    samples[:] = [InvalidEvalSample("1", "lost")]
    with raises_input_error(ErrorCode.EMPTY_DATASET, "tiny", "lost"):
        evaluate(config, plain)
    assert not config.output.exists()


def test_no_response_is_an_error(config, plain, monkeypatch):
    def fail(self, conversations, **options):
        raise InputError("The logits are not finite.", ErrorCode.NON_FINITE)

    monkeypatch.setattr(Engine, "batch_outputs", fail)
    with raises_input_error(ErrorCode.EMPTY_DATASET, "20 samples", "not finite"):
        evaluate(config, plain)
    assert "results.json" not in files(config.output)


def test_task_without_data_is_skipped(config, plain, tmp_path):
    results = evaluate(replace(config, tasks="tiny,pope_random", data=tmp_path), plain)
    assert results["tasks"].keys() == {"tiny"}
    assert "coco_pope_random.json" in results["skipped"]["pope_random"]
    assert "pope_random" in plain.file.getvalue()
    assert "coco_pope_random.json" in (config.output / "report.md").read_text()


def test_judge_runs_at_the_end_and_may_fail(config, plain, task, monkeypatch):
    calls = []

    def unreachable(run, endpoint, console):
        calls.append((run, endpoint, (run / "results.json").is_file()))
        raise InputError("The server does not answer.", ErrorCode.NETWORK)

    monkeypatch.setattr(evaluate_module, "judge_run", unreachable)
    endpoint = ChatEndpoint("http://localhost:1/v1", "j")
    judged = replace(config, judge=endpoint)
    evaluate(judged, plain)
    assert calls == [], "no task needs a judge"
    changed = task.config.model_copy(update={"judge": True})
    monkeypatch.setattr(evaluate_module, "find_tasks", lambda *_: [replace(task, config=changed)])
    evaluate(judged, plain)
    assert calls == [(config.output, endpoint, True)]
    assert "The server does not answer." in plain.file.getvalue()


def test_report_has_the_images(config, plain, monkeypatch):
    monkeypatch.setattr(evaluate_module, "has_matplotlib", lambda: True)
    evaluate(replace(config, limit=5), plain)  # of two categories
    with Image.open(config.output / "report.png") as report:
        pixels = np.asarray(report.convert("RGB")).reshape(-1, 3)
    for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0)):
        share = (pixels == color).all(1).mean()
        assert 0.05 < share < 0.3, (color, share)
    for color in ((0, 128, 0), (220, 20, 60)):  # green: correct, crimson: wrong
        assert (pixels == color).all(1).sum() > 50, color


def test_report_without_matplotlib(config, plain, monkeypatch):
    monkeypatch.setattr(evaluate_module, "has_matplotlib", report_module.has_matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate(config, plain)
    assert "pip install 'owl2-vlm[plot]'" in plain.file.getvalue()
    assert files(config.output) == {"results.json", *REPORTS, "responses/tiny.jsonl"}


def test_invalid_options_leave_no_files(config, plain, tmp_path):
    (tmp_path / "file").write_text("")
    args = config.model_args
    for changes, needle in (
        ({"tasks": "tinz"}, "'tiny'"),
        ({"tasks": None}, "tiny"),
        ({"suite": "papers"}, "'paper'"),
        ({"tasks": "mme"}, "--data"),
        ({"tasks": str(tmp_path / "mine.jsonl")}, "mine.jsonl"),
        ({"model_args": replace(args, model=str(tmp_path / "nowhere"))}, "nowhere"),
        ({"model_args": replace(args, model=str(tmp_path / "file"))}, "file"),
        ({"model_args": replace(args, device="abacus")}, "abacus"),
        ({"image_size": 9}, "patch"),
        ({"output": tmp_path / "file"}, "file"),
        ({"output": tmp_path / "file" / "out"}, "file"),
        ({"batch_size": 0}, "batch_size"),
        ({"limit": 0}, "limit"),
    ):
        with pytest.raises(InputError) as error:
            evaluate(replace(config, **changes), plain)
        assert needle in str(error.value)
    assert files(tmp_path) == {"file"}
    assert not config.output.exists()


def test_custom_questions_are_asked_as_written_with_room_for_the_answers(config, plain, tmp_path):
    """The limit is the longest expected answer; responses that reach a limit are reported."""
    long = "a red circle " * 12
    lines = [{"question": "what is this?", "answers": [long, "a"]}]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = replace(config, tasks=str(path))
    result = evaluate(config, plain)["tasks"]["mine"]
    assert result["generation"]["max_new_tokens"] > 24
    [row] = rows(config.responses / "mine.jsonl")
    assert "what is this? ASSISTANT:" in row["prompt"]
    result = evaluate(replace(config, max_new_tokens=1, prompt="{question} Now."), plain)
    result = result["tasks"]["mine"]
    assert result["generation"]["max_new_tokens"] == 1
    assert result["truncated"] == 1
    assert "--max-new-tokens" in plain.file.getvalue()
    assert "this? Now. ASSISTANT:" in rows(config.responses / "mine.jsonl")[0]["prompt"]
