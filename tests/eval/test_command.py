"""The command line of `owl2 eval`, with easy-VQA."""

import json
import os
import subprocess
import sys

import pytest

from tests.cli import run_cli  # noqa: F401 - a fixture
from tests.eval.stub import completion, serving

pytest.importorskip("easy_vqa")


@pytest.fixture
def owl2(run_cli, tiny_checkpoint, tmp_path):  # noqa: F811 - the fixture
    """`owl2 eval` with the tiny checkpoint: its exit code, stdout and stderr."""

    def run(*arguments, tasks="easy_vqa", model=tiny_checkpoint, output=tmp_path / "out"):
        base = ["eval", "--model", model, "--tasks", tasks, "--output", output]
        result = run_cli(*base, "--device", "cpu", "--dtype", "float32", *arguments)
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def command(run_cli):  # noqa: F811 - the fixture
    """Any `owl2 eval ...`: its exit code, stdout and stderr."""

    def run(*arguments):
        result = run_cli("eval", *arguments)
        return result.exit_code, result.stdout, result.stderr

    return run


def test_easy_vqa(owl2, tmp_path):
    code, out, err = owl2(
        "--prompt", "short", "--limit", "40", "--batch-size", "16", "--no-image-baseline"
    )
    assert (code, err) == (0, "")
    assert "yes or no" in out
    assert f"scores: {tmp_path / 'out' / 'results.json'}" in out
    result = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["easy_vqa"]
    assert (result["n"], result["limit"], result["prompt"]) == (40, 40, "{question}")
    assert result["metrics"].keys() == {"accuracy", "accuracy_no_image"}
    assert all(type(score) is float for score in result["metrics"].values())
    line = (tmp_path / "out" / "responses" / "easy_vqa.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["prompt"] == "USER: <|image|>what is the red shape? ASSISTANT:"


def test_options(owl2, tmp_path):
    code, _, err = owl2(
        "--prompt", "{question} why", "--limit", "2", "--no-mam", "--image-size", "16"
    )
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["easy_vqa"]
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
def test_invalid_options_exit_with_2(owl2, tmp_path, arguments, options, needle):
    code, out, err = owl2(*arguments, **options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert needle in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(owl2, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = owl2(output=tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in err
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_package_exits_with_2(owl2, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    code, _, err = owl2()
    assert code == 2
    assert "pip install 'owl2-vlm[data]'" in err


def test_interrupt_exits_with_130(owl2, monkeypatch, tmp_path):
    from owl2.engine.engine import Engine

    batch, calls = Engine.batch, []

    def stopping(self, conversations, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(self, conversations, **options)

    monkeypatch.setattr(Engine, "batch", stopping)
    code, out, err = owl2("--prompt", "short", "--limit", "20", "--batch-size", "8")
    assert code == 130
    assert "Traceback" not in err
    assert "Stopped" in out
    assert len((tmp_path / "out/responses/easy_vqa.part-0.jsonl").read_text().splitlines()) == 1 + 8
    assert not (tmp_path / "out/results.json").exists()


def test_list(command, tmp_path):
    code, out, err = command("--list", "--data", tmp_path)
    assert (code, err) == (0, "")
    assert "pope_random" in out
    assert f"{tmp_path / 'vqav2'}" in out


def test_estimate_writes_no_files(command, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--estimate", "--model", tiny_checkpoint, "--tasks", "easy_vqa", "--limit", "6")
    code, out, err = command(*arguments, "--batch-size", "2", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "prompt tokens" in out
    assert list(tmp_path.iterdir()) == []


def test_compare(owl2, command, tmp_path):
    for name, extra in (("a", ()), ("b", ("--image-policy", "pad"))):
        limits = ("--prompt", "short", "--limit", "4")
        assert owl2(*limits, *extra, output=tmp_path / name)[0] == 0
    page = tmp_path / "page.html"
    code, out, err = command("compare", tmp_path / "a", tmp_path / "b", "--output-file", page)
    assert (code, err) == (0, "")
    assert "preprocessing.policy" in out
    assert page.read_text().startswith("<!doctype html>")


def test_failing_judge_exits_with_2(command, tmp_path):
    metadata = {"reference": "a dog", "capabilities": ["rec"]}
    row = {"id": "1", "question": "What?", "category": "", "prompt": "", "response": "a"}
    row |= {"metadata": metadata}
    write_judged_run(tmp_path, row)
    with serving((400, "never", 0.0)) as server:
        url = ("--judge-url", server.url, "--judge-model", "j")
        code, out, err = command("judge", tmp_path, *url)
        assert (code, "0 of 1" in out) == (2, True)
        assert "mm_vet, 1: " in err
        assert "400: never" in err
        server.script = [completion("Score: 1")]
        assert command("judge", tmp_path, *url)[0] == 0
        assert "| score | 1 | 100.00% |" in (tmp_path / "report.md").read_text()
        assert command("judge", tmp_path, *url)[0] == 0, "all are judged"
        assert len(server.asked) == 2


def write_judged_run(folder, row):
    """The files of `owl2 eval` for a judge and for the report."""
    entry = {
        "title": "MM-Vet", "suite": "mllm", "main_metric": "score", "paper": {}, "scale": 100,
        "n": 1, "note": "", "limit": None, "invalid": {"n": 0, "first": []},
        "metrics": {"judged": 0.0},
        "generation": {"dtype": "float32", "mam": True},
        "preprocessing": {"size": 8, "policy": "resize"}, "versions": {},
    }  # fmt: skip
    results = {
        "model": "m",
        "weights_fingerprint": "f",
        "environment": {"name": "cpu", "processes": 1},
    }
    results |= {"tasks": {"mm_vet": entry}, "skipped": {}}
    (folder / "results.json").write_text(json.dumps(results))
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
def test_missing_options_exit_with_2(command, monkeypatch, tmp_path, arguments, needle):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert needle in err


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
