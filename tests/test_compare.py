"""recipes/speed/compare.py: equal answers of the engines, the GGUF file, and the table."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from owl2.checkpoints.from_backbones import load_llm

FOLDER = Path(__file__).parents[1] / "recipes" / "speed"
PROMPTS = [[5, 9, 200, 31], [77, 300, 4, 4]]


@pytest.fixture(scope="module")
def compare():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("compare")
    for name in [name for name in sys.modules if name.split(".")[0] in ("compare", "engines")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(compare, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    compare.make(path, "tiny", "float32")
    return path


def prepare(compare, folder, engine, bits=16):
    return importlib.import_module(f"engines.{engine}").prepare(
        compare.Task(folder, bits, requests=2, positions=16, threads=1)
    )


def test_owl2_and_transformers_answer_the_same(compare, folder):
    answers = prepare(compare, folder, "owl2")(PROMPTS, 12)
    assert [len(ids) for ids in answers] == [12, 12]
    assert answers == prepare(compare, folder, "transformers")(PROMPTS, 12)


def test_quantized_weights_are_measured(compare, folder):
    task = compare.Task(folder, 4, max(compare.COUNTS), positions=8, threads=1)
    result = compare.measure("owl2", task, prompt=5, new=3, repeats=1)
    assert (result["engine"], result["bits"]) == ("owl2", 4)
    for count, figures in result["requests"].items():
        assert [len(ids) for ids in figures["answers"]] == [3] * int(count)
        assert figures["first"] > 0


def test_the_gguf_file_has_the_same_weights(folder):
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        expected = load_llm(folder / "llama", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(
            load_llm(folder / "llama.gguf", dtype=torch.float32)(ids).logits, expected
        )


def test_short_answers_are_not_measured(compare):
    with pytest.raises(RuntimeError, match="instead of 3"):
        compare.timed(lambda prompts, new: [[1]] * len(prompts), PROMPTS, 3, 1)


def run(compare, engine, bits, first, decode, answers):
    figures = {"first": first, "decode": decode, "answers": answers}
    requests = {str(count): figures for count in compare.COUNTS}
    return {"engine": engine, "bits": bits, "requests": requests}


def test_table(compare):
    runs = [
        run(compare, "owl2", 16, 0.5, 10, [[1, 2, 3]]),
        run(compare, "owl2", 16, 0.7, 50, [[1, 2, 3]]),
        run(compare, "llamacpp", 16, 0.4, 20, [[1, 2, 4]]),
        run(compare, "owl2", 4, 0.9, 9, [[4, 2, 3]]),
    ]
    lines = compare.table(runs).splitlines()
    assert lines[2] == "| 16 bits | owl2 | 0.6 | **30** | 0.6 | **30** | 2 | 3 |"
    assert lines[3] == "| 16 bits | llama.cpp | **0.4** | 20 | **0.4** | 20 | 1 | 2 |"
    assert lines[4] == "| 4 bits | owl2 | **0.9** | **9** | **0.9** | **9** | 1 | 0 |"


def measure_all(compare, folder, **changes):
    settings = {"engines": ["owl2", "vllm"], "bits": [16, 8], "rounds": 2, "pythons": {}}
    settings |= {"options": [], "minutes": 1}
    return compare.measure_all(folder, **settings | changes)


def test_rounds_alternate_and_resume(compare, tmp_path, monkeypatch):
    calls = []

    def write(command, log):
        engine, bits = (command[command.index(name) + 1] for name in ("--engine", "--bits"))
        calls.append((command[0], engine, int(bits)))
        if engine == "vllm":
            return "exit code 1: not installed"
        result = run(compare, engine, int(bits), 0.5, 10, [[1]])
        Path(command[command.index("--output") + 1]).write_text(json.dumps(result))
        return None

    monkeypatch.setattr(compare, "_run", write)
    pythons = {"vllm": ["other-python"]}
    assert measure_all(compare, tmp_path, minutes=-1, pythons=pythons)["runs"] == []
    found = measure_all(compare, tmp_path, pythons=pythons)
    one_round = [(sys.executable, "owl2", 16), (sys.executable, "owl2", 8)]
    assert calls == [one_round[0], ("other-python", "vllm", 16), one_round[1], *one_round]
    assert found["skipped"] == {"vllm, 16 bits": "exit code 1: not installed"}
    assert [(r["engine"], r["bits"]) for r in found["runs"]] == [("owl2", 16)] * 2 + [
        ("owl2", 8)
    ] * 2
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    measure_all(compare, tmp_path, engines=["owl2"])
    assert len(calls) == 5, "measurements with a file are not repeated"


@pytest.mark.slow
def test_each_engine_runs_in_its_own_process(compare, folder):
    lengths = ["--prompt", "5", "--new", "3", "--repeats", "1"]
    engines = ["owl2", "transformers"]
    found = measure_all(compare, folder, engines=engines, rounds=1, options=lengths, minutes=15)
    assert found["skipped"] == {}
    assert len(found["runs"]) == 3
    assert "transformers" in (folder / "compare.md").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["all", "models", "--engines", "owl2,other"],
        ["all", "models", "--bits", "16,2"],
        ["measure", "models"],
        ["all", "missing"],
    ],
)
def test_errors_of_the_user_exit_with_2(compare, tmp_path, monkeypatch, arguments):
    (tmp_path / "models" / "owl2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
