"""The command line of `owl2 eval`, with easy-VQA."""

import json
import os
import subprocess
import sys

import pytest

from owl2.data.datasets import load_dataset
from owl2.engine.engine import Engine
from owl2.eval.readers import special
from tests.eval.stub import completion, serving

pytest.importorskip("easy_vqa")


@pytest.fixture(autouse=True)
def skip_figures(monkeypatch):
    monkeypatch.setattr("owl2.eval.evaluate.has_matplotlib", lambda: False)


@pytest.fixture(scope="module")
def first_questions():
    return load_dataset("easy_vqa", "test", style="single", prompt="{question}")[:50]


@pytest.fixture(autouse=True)
def read_first_questions(monkeypatch, first_questions):
    """Reading all 9,673 questions takes more than a second."""
    monkeypatch.setattr(special, "load_dataset", lambda *_, **__: first_questions)


@pytest.fixture
def owl2_eval(run_cli):
    """`owl2 eval ...`"""
    return lambda *arguments: run_cli("eval", *arguments)


@pytest.fixture
def evaluate(owl2_eval, tiny_checkpoint, tmp_path):
    """`owl2 eval` with the tiny checkpoint."""

    def run(*arguments, tasks="easy_vqa", model=tiny_checkpoint, output=tmp_path / "out"):
        base = ["--model", model, "--tasks", tasks, "--output", output, "--device", "cpu"]
        return owl2_eval(*base, "--dtype", "float32", *arguments)

    return run


def task_result(output):
    return json.loads((output / "results.json").read_text())["tasks"]["easy_vqa"]


def test_easy_vqa(evaluate, tmp_path):
    options = ("--prompt", "short", "--limit", "40", "--batch-size", "16")
    run = evaluate(*options, "--no-image-baseline")
    assert (run.exit_code, run.stderr) == (0, "")
    assert "yes or no" in run.stdout
    assert f"scores: {tmp_path / 'out' / 'results.json'}" in run.stdout
    result = task_result(tmp_path / "out")
    assert (result["n"], result["limit"], result["prompt"]) == (40, 40, "{question}")
    assert result["metrics"].keys() == {"accuracy", "accuracy_no_image"}
    assert all(type(score) is float for score in result["metrics"].values())
    line = (tmp_path / "out" / "responses" / "easy_vqa.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["prompt"] == "USER: <|image|>what is the red shape? ASSISTANT:"


def test_ablations(evaluate, tmp_path):
    run = evaluate("--prompt", "{question} why", "--limit", "2", "--no-mam", "--image-size", "16")
    assert (run.exit_code, run.stderr) == (0, "")
    result = task_result(tmp_path / "out")
    assert result["metrics"].keys() == {"accuracy"}
    assert result["prompt"] == "{question} why"
    assert result["generation"]["mam"] is False
    assert result["preprocessing"]["size"] == 16


@pytest.mark.parametrize(
    ("arguments", "options", "needle"),
    [
        ([], {"tasks": "easy_vqq"}, "'easy_vqa'"),
        ([], {"tasks": ","}, "easy_vqa"),
        ([], {"model": "/no/where"}, "/no/where"),
        (["--prompt", "what?"], {}, "{question}"),
        (["--dtype", "int3"], {}, "int3"),
        (["--suite", "papers"], {}, "'paper'"),
        (["--judge-url", "http://localhost:1"], {}, "--judge-model"),
        (["--image-size", "7"], {}, "patch"),
        ([], {"tasks": "vqav2"}, "visualqa.org"),
    ],
)
def test_invalid_options_exit_with_2(evaluate, tmp_path, arguments, options, needle):
    run = evaluate(*arguments, **options)
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ")
    assert needle in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_missing_package_exits_with_2(evaluate, monkeypatch):
    monkeypatch.setattr(special, "load_dataset", load_dataset)
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    run = evaluate()
    assert run.exit_code == 2
    assert "pip install 'owl2-vlm[data]'" in run.stderr


def test_interrupt_exits_with_130(evaluate, monkeypatch, tmp_path):
    batch, calls = Engine.batch_outputs, []

    def stop(self, conversations, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(self, conversations, **options)

    monkeypatch.setattr(Engine, "batch_outputs", stop)
    run = evaluate("--prompt", "short", "--limit", "20", "--batch-size", "8")
    assert run.exit_code == 130
    assert "Traceback" not in run.stderr
    assert "Stopped" in run.stdout
    assert len((tmp_path / "out/responses/easy_vqa.part-0.jsonl").read_text().splitlines()) == 1 + 8
    assert not (tmp_path / "out/results.json").exists()


def test_list(owl2_eval, tmp_path):
    run = owl2_eval("--list", "--data", tmp_path)
    assert (run.exit_code, run.stderr) == (0, "")
    assert "pope_random" in run.stdout
    assert f"{tmp_path / 'vqav2'}" in run.stdout


def test_estimate_writes_no_files(owl2_eval, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--estimate", "--model", tiny_checkpoint, "--tasks", "easy_vqa", "--limit", "6")
    run = owl2_eval(*arguments, "--batch-size", "2", "--device", "cpu")
    assert (run.exit_code, run.stderr) == (0, "")
    assert "prompt tokens" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_compare(evaluate, owl2_eval, tmp_path):
    for name, extra in (("a", ()), ("b", ("--image-policy", "pad"))):
        run = evaluate("--prompt", "short", "--limit", "4", *extra, output=tmp_path / name)
        assert run.exit_code == 0
    page = tmp_path / "page.html"
    run = owl2_eval("compare", tmp_path / "a", tmp_path / "b", "--output-file", page)
    assert (run.exit_code, run.stderr) == (0, "")
    assert "preprocessing.policy" in run.stdout
    assert page.read_text().startswith("<!doctype html>")


def test_judge_exits_with_2_if_no_response_is_judged(owl2_eval, tmp_path):
    write_judged_run(tmp_path)
    with serving((400, "never", 0.0)) as server:
        arguments = ("judge", tmp_path, "--judge-url", server.url, "--judge-model", "j")
        run = owl2_eval(*arguments)
        assert (run.exit_code, "0 of 1" in run.stdout) == (2, True)
        assert "mm_vet, 1: " in run.stderr
        assert "400: never" in run.stderr
        assert "to be judged" in (tmp_path / "report.md").read_text()
        server.script = [completion("Score: 1")]
        assert owl2_eval(*arguments).exit_code == 0
        assert "| score | 1 | 100.00% |" in (tmp_path / "report.md").read_text()
        assert owl2_eval(*arguments).exit_code == 0, "all are judged"
        assert len(server.asked) == 2


def write_judged_run(folder):
    """The files of `owl2 eval` for a judge and for the report."""
    entry = {
        "title": "MM-Vet", "suite": "mllm", "main_metric": "score", "paper": {}, "scale": 100,
        "published": {}, "digits": 2,
        "n": 1, "note": "", "limit": None, "invalid": {"n": 0, "first": []},
        "metrics": {"judged": 0.0},
        "generation": {"dtype": "float32", "mam": True},
        "preprocessing": {"size": 8, "policy": "resize"}, "versions": {},
    }  # fmt: skip
    results = {
        "model": "m", "weights_fingerprint": "f", "environment": {"name": "cpu", "processes": 1},
        "tasks": {"mm_vet": entry}, "skipped": {},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    row = {"id": "1", "question": "What?", "category": "", "prompt": "", "response": "a"}
    row["metadata"] = {"reference": "a dog", "capabilities": ["rec"]}
    (folder / "responses").mkdir()
    (folder / "responses" / "mm_vet.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--tasks", "easy_vqa", "--output", "x"], "--model"),
        (["--tasks", "easy_vqa", "--model", "x"], "--output"),
        (["judge", "run"], "--judge-url"),
        (["compare", "a", "b"], "a/results.json"),
    ],
)
def test_missing_options_exit_with_2(owl2_eval, monkeypatch, tmp_path, arguments, needle):
    monkeypatch.chdir(tmp_path)
    run = owl2_eval(*arguments)
    assert (run.exit_code, run.stdout) == (2, "")
    assert needle in run.stderr


@pytest.mark.slow
def test_two_concurrent_processes_give_the_results_of_one(tiny_checkpoint, tmp_path):
    def start(output, **environment):
        arguments = ["--model", tiny_checkpoint, "--tasks", "easy_vqa", "--prompt", "short"]
        arguments += ["--limit", "30", "--batch-size", "4", "--output", output, "--device", "cpu"]
        arguments += ["--dtype", "float32"]
        command = [sys.executable, "-m", "owl2", "eval", *map(str, arguments)]
        return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE)

    two = [start(tmp_path / "two", RANK=rank, WORLD_SIZE="2") for rank in "01"]
    runs = [*two, start(tmp_path / "one")]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert outputs[1] == b"", "only process 0 prints"
    answers = "responses/easy_vqa.jsonl"
    assert (tmp_path / "two" / answers).read_bytes() == (tmp_path / "one" / answers).read_bytes()
    assert [path.name for path in (tmp_path / "two" / "responses").iterdir()] == ["easy_vqa.jsonl"]
