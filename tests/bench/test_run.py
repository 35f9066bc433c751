"""`owl2 bench` from end to end with the tiny size: what is written, refused and kept; no timing."""

import io
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console

from owl2 import cli
from owl2.bench import memory, run
from owl2.bench.cases import FIGURES, Figure, Run
from owl2.bench.presets import Origin
from owl2.bench.roofline import Limits
from owl2.bench.run import Settings, bench
from owl2.bench.timing import measure, result
from owl2.errors import InputError
from owl2.train.parallelize import is_checkpointed

NAMES = {
    *("encode_8", "prefill_1", "prefill_8", "ttft_second_question"),
    *("decode_1", "decode_1_int8", "decode_16", "generate_16_mixed"),
    *("train_step", "train_step_packed", "train_memory", "mam_decode", "mam_prefill"),
}
TINY = Settings(size="tiny", repeats=1, device="cpu", dtype="float32")


@pytest.fixture
def quick(monkeypatch):
    """The machine's limits are not measured."""
    monkeypatch.setattr(run, "measure_limits", lambda *_: Limits(4e11, 2e10, 3e10))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


def test_the_names_are_those_of_the_issue():
    assert set(FIGURES) == NAMES


def test_what_is_written(quick, console, tmp_path):
    names = sorted(NAMES - {"generate_16_mixed", "train_memory"})
    settings = replace(TINY, figures=",".join(names), output=tmp_path / "out")
    results = bench(settings, console)
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written == results
    assert written["finished"] is True
    machine = written["machine"]
    assert (machine["matmul_gflops"], machine["matvec_gb_s"], machine["read_gb_s"]) == (400, 20, 30)
    assert sorted(written["figures"]) == sorted(names)
    for name, figure in written["figures"].items():
        assert {"textbook", "owl2", "llama", "unit", "ratio", "limit_share", "spread"} <= {*figure}
        assert figure["owl2"] > 0
        assert figure["ratio"] > 0
        assert figure["limit_share"] > 0, name
        assert (figure["textbook"] is None) == name.startswith("mam_")
    assert written["figures"]["decode_16"]["against_one"] > 0
    assert written["figures"]["ttft_second_question"]["against_first"] > 0
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000
    page = (tmp_path / "out" / "bench.md").read_text()
    shown = console.file.getvalue()
    for name in names:
        assert f"| {name} |" in page
        assert name in shown


@pytest.mark.slow
def test_all_of_it_as_a_program(tmp_path, monkeypatch):
    arguments = ["bench", "--size", "tiny", "--repeats", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["owl2", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert set(figures) == NAMES
    assert figures["train_memory"]["least_kept"] > 0


def test_what_does_not_fit_is_left_out(quick, console, monkeypatch):
    def too_large(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(FIGURES, "decode_1", too_large)
    results = bench(replace(TINY, figures="decode_1,mam_prefill"), console)
    assert results["finished"] is True
    assert [*results["figures"]] == ["mam_prefill"]
    assert results["left_out"] == {"decode_1": "CUDA out of memory."}
    assert "decode_1 is left out: CUDA out of memory." in console.file.getvalue()


def test_ratios_and_shares():
    calls = []
    runs = {
        "textbook": Run(lambda: calls.append("textbook") or 6 * 2**20),
        "owl2": Run(lambda: calls.append("owl2") or 3 * 2**20),
        "other": Run(lambda: calls.append("other") or 2**20),
    }
    figure = Figure("MiB", runs, None, ratio=("owl2", "textbook"), most=2)
    costs = list(measure(figure, 5, torch.device("cpu")))[-1]
    assert calls == ["textbook", "owl2", "other"] * 2, "they take turns"
    found = result(figure, costs)
    assert (found["textbook"], found["owl2"], found["llama"]) == (6, 3, None)
    assert (found["ratio"], found["against_other"]) == (0.5, 1 / 3)
    assert found["rounds"] == 2
    speed = replace(figure, unit="tokens/s", least=0.5, ratio=("textbook", "owl2"))
    speed = replace(speed, runs={name: Run(r.call, 10) for name, r in runs.items()})
    found = result(speed, {"textbook": [0.4, 0.8, 0.4], "owl2": [0.1], "other": [0.2]})
    assert (found["textbook"], found["owl2"]) == (2.5, 10)
    assert found["ratio"] == 4
    assert found["limit_share"] == 0.5
    assert found["spread"]["textbook"] == [1.25, 2.5]


def test_ctrl_c_keeps_what_was_measured(quick, console, tmp_path, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(FIGURES, "decode_1", stopped)
    settings = replace(TINY, figures="prefill_1,decode_1", output=tmp_path)
    results = bench(settings, console)
    assert results["finished"] is False
    assert [*results["figures"]] == ["prefill_1"]
    assert json.loads((tmp_path / "bench.json").read_text()) == results


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"figures": "decode_2"}, "decode_2"),
        ({"figures": ","}, "at least one"),
        ({"size": "8b"}, "8b"),
        ({"model": "here"}, "either"),
        ({"size": None, "model": "/nowhere"}, "/nowhere"),
        ({"dtype": "int3"}, "int3"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_is_refused(quick, console, settings, said):
    with pytest.raises(InputError, match=said):
        bench(replace(TINY, **settings), console)


def test_a_image_without_matplotlib(console, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"owl2-vlm\[plot\]"):
        bench(replace(TINY, output=tmp_path), console)


def test_a_checkpoint(quick, console, tiny_checkpoint):
    settings = replace(TINY, size=None, model=str(tiny_checkpoint), figures="decode_1")
    assert bench(settings, console)["figures"]["decode_1"]["owl2"] > 0


def test_memory_is_that_of_the_steps(monkeypatch):
    """In this process, where other tests have been: only that it runs, and who is asked for."""
    asked = []

    def note(training, name):
        asked.append((name, is_checkpointed(training.model)))

    steps = {name: (how, partial(note, name=name)) for name, (how, _) in memory.STEPS.items()}
    monkeypatch.setattr(memory, "STEPS", steps)
    for name, again in (("owl2", True), ("all_kept", False), ("textbook", False)):
        del asked[:]
        memory.measure(name, Origin(size="tiny", device="cpu", dtype="float32"))
        assert asked == [(name, again)] * memory.COUNT
    assert memory.peak_resident() > 50 * 2**20


@pytest.mark.slow
def test_a_process_that_fails_says_why():
    with pytest.raises(memory.NotMeasured, match=r"the process of nobody .*nobody"):
        memory.step_memory("nobody", Origin(size="tiny", device="cpu", dtype="float32"))
