"""`owl2 bench` end to end with the tiny preset: results, errors and interruptions; no timings."""

import io
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from owl2.bench import run, training
from owl2.bench.cases import CASES
from owl2.bench.measure import BenchCase, Roofline, Run, case_result, measure_case
from owl2.bench.presets import BenchModel
from owl2.bench.run import bench
from owl2.errors import ErrorCode
from owl2.train.parallelize import is_checkpointed
from tests.errors import raises_input_error

TINY = BenchModel(size="tiny", device="cpu", dtype="float32")


@pytest.fixture
def fixed_roofline(monkeypatch):
    """Do not measure the limits of the machine."""
    monkeypatch.setattr(run, "measure_roofline", lambda *_: Roofline(4e11, 3e10))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


def test_results_are_written_and_printed(fixed_roofline, console, tmp_path):
    names = sorted(CASES.keys() - {"generate_16_mixed", "train_memory"})
    results = bench(TINY, console, cases=",".join(names), output=tmp_path / "out", repeats=1)
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written == results
    assert written["finished"] is True
    machine = written["machine"]
    assert (machine["matmul_gflops"], machine["read_gb_s"]) == (400, 30)
    assert sorted(written["cases"]) == names
    for name, case in written["cases"].items():
        assert {"baseline", "owl2", "llama", "unit", "spread"} <= {*case}
        assert case["owl2"] > 0
        assert case["ratio"] > 0
        assert case["roofline_fraction"] > 0, name
        assert (case["baseline"] is None) == name.startswith("mam_")
    assert written["cases"]["decode_16"]["vs_single"] > 0
    assert written["cases"]["ttft_second_question"]["vs_first"] > 0
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000
    page = (tmp_path / "out" / "bench.md").read_text()
    for name in names:
        assert f"| {name} |" in page
        assert name in console.file.getvalue()


@pytest.mark.slow
def test_all_cases_run(run_cli, tmp_path):
    result = run_cli("bench", "--size", "tiny", "--repeats", "2", "--output", tmp_path)
    assert result.exit_code == 0
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert set(cases) == set(CASES)
    assert cases["train_memory"]["full_checkpointing"] > 0


def test_a_case_that_does_not_fit_is_skipped(fixed_roofline, console, monkeypatch):
    def raise_out_of_memory(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(CASES, "decode_1", raise_out_of_memory)
    results = bench(TINY, console, cases="decode_1,mam_prefill", repeats=1)
    assert results["finished"] is True
    assert [*results["cases"]] == ["mam_prefill"]
    assert results["skipped"] == {"decode_1": "CUDA out of memory."}


def test_ratios_of_a_case():
    calls = []
    runs = {
        "baseline": Run(lambda: calls.append("baseline") or 6 * 2**20),
        "owl2": Run(lambda: calls.append("owl2") or 3 * 2**20),
        "other": Run(lambda: calls.append("other") or 2**20),
    }
    case = BenchCase("MiB", runs, None, ratio=("owl2", "baseline"), max_rounds=2)
    costs = list(measure_case(case, 5, torch.device("cpu")))[-1]
    assert calls == ["baseline", "owl2", "other"] * 2, "the implementations alternate"
    result = case_result(case, costs)
    assert (result["baseline"], result["owl2"], result["llama"]) == (6, 3, None)
    assert (result["ratio"], result["vs_other"]) == (0.5, 1 / 3)
    assert result["roofline_fraction"] is None
    assert result["rounds"] == 2

    runs = {name: Run(run.call, 10) for name, run in runs.items()}
    speed = BenchCase("tokens/s", runs, min_seconds=0.5)
    result = case_result(speed, {"baseline": [0.4, 0.8, 0.4], "owl2": [0.1], "other": [0.2]})
    assert (result["baseline"], result["owl2"]) == (2.5, 10)
    assert result["ratio"] == 4
    assert result["roofline_fraction"] == 0.5
    assert result["spread"]["baseline"] == [1.25, 2.5]


def test_ctrl_c_keeps_the_results(fixed_roofline, console, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(CASES, "decode_1", interrupt)
    results = bench(TINY, console, cases="prefill_1,decode_1", output=tmp_path, repeats=1)
    assert results["finished"] is False
    assert [*results["cases"]] == ["prefill_1"]
    assert json.loads((tmp_path / "bench.json").read_text()) == results


@pytest.mark.parametrize(
    ("options", "code", "value"),
    [
        ({"size": "8b"}, ErrorCode.UNKNOWN_NAME, "8b"),
        ({"model": "here"}, ErrorCode.CONFLICT, "--size"),
        ({"size": None, "model": "/nowhere"}, ErrorCode.FILE_NOT_FOUND, "/nowhere"),
        ({"dtype": "int3"}, ErrorCode.UNKNOWN_NAME, "int3"),
        ({"device": "abacus"}, ErrorCode.UNSUPPORTED, "abacus"),
    ],
)
def test_invalid_models(fixed_roofline, console, options, code, value):
    with raises_input_error(code, value):
        bench(replace(TINY, **options), console, cases="decode_1")


@pytest.mark.parametrize(
    ("cases", "code", "value"),
    [
        ("decode_2", ErrorCode.UNKNOWN_NAME, "decode_2"),
        (",", ErrorCode.MISSING_VALUE, "--cases"),
    ],
)
def test_invalid_cases(console, cases, code, value):
    with raises_input_error(code, value):
        bench(TINY, console, cases=cases)


def test_a_plot_requires_matplotlib(console, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "owl2-vlm[plot]"):
        bench(TINY, console, output=tmp_path)


def test_a_checkpoint_can_be_measured(fixed_roofline, console, tiny_checkpoint):
    source = replace(TINY, size=None, model=str(tiny_checkpoint))
    assert bench(source, console, cases="decode_1", repeats=1)["cases"]["decode_1"]["owl2"] > 0


@pytest.mark.parametrize(
    ("name", "checkpointed"), [("owl2", True), ("no_checkpointing", False), ("baseline", False)]
)
def test_memory_is_measured_over_two_steps(monkeypatch, name, checkpointed):
    calls = []

    def record(steps):
        calls.append(is_checkpointed(steps.model))

    checkpointing, _ = training.MEMORY_STEPS[name]
    monkeypatch.setitem(training.MEMORY_STEPS, name, (checkpointing, record))
    training.peak_step_bytes(name, TINY)
    assert calls == [checkpointed] * 2


class ExitingModel(BenchModel):
    """A model whose process ends while it is loaded, as when the system has no more memory."""

    def load(self):
        os._exit(9)


@pytest.mark.slow
def test_a_failed_process_is_reported():
    with pytest.raises(training.MeasurementError, match="owl2"):
        training.measure_memory("owl2", ExitingModel(size="tiny", device="cpu", dtype="float32"))
