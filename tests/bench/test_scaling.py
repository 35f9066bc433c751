"""`owl2 bench --scaling` with the tiny preset: points, skipped points, files and errors."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from owl2.bench import run, scaling
from owl2.bench.flops import cache_bytes
from owl2.bench.measure import Roofline
from owl2.bench.presets import BenchModel
from owl2.bench.run import bench_scaling
from owl2.bench.scaling import CURVES
from owl2.errors import ErrorCode
from tests.errors import raises_input_error

TINY = BenchModel(size="tiny", device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two points per curve, and limits that are not measured."""
    monkeypatch.setattr(run, "measure_roofline", lambda *_: Roofline(4e11, 3e10))
    for name, curve in CURVES.items():
        monkeypatch.setitem(CURVES, name, replace(curve, points=curve.points[:2]))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


def test_curves_are_written_and_printed(console, tmp_path):
    results = bench_scaling(TINY, console, sizes="tiny", output=tmp_path, repeats=1)
    assert json.loads((tmp_path / "scaling.json").read_text()) == results
    assert (results["finished"], results["skipped"]) == (True, {})
    series = {name: curve["points"] for name, curve in results["curves"].items()}
    assert {name: [point["x"] for point in points] for name, points in series.items()} == {
        "images": [1, 2],
        "context": [256, 512],
        "concurrency": [1, 2],
        "sizes": [TINY.num_parameters()],
    }
    assert series["sizes"][0]["label"] == "tiny"
    for points in series.values():
        for case in points[0]["cases"].values():
            assert case["owl2"] > 0
            assert 0 < case["roofline_fraction"] < 1
    page = (tmp_path / "scaling.md").read_text()
    for name in CURVES:
        assert (tmp_path / f"scaling_{name}.png").stat().st_size > 1000
        assert f"| {name} |" in page
        assert name in console.file.getvalue()


def test_a_point_that_takes_too_long_is_skipped(console, monkeypatch):
    monkeypatch.setattr(scaling, "MAX_POINT_SECONDS", 0.0)
    results = bench_scaling(TINY, console, cases="images", repeats=1)
    assert [point["x"] for point in results["curves"]["images"]["points"]] == [1]
    assert [*results["skipped"]] == ["images 2"]
    assert "images 2 skipped" in console.file.getvalue()


def test_a_size_that_does_not_fit_into_memory_is_skipped(console, monkeypatch):
    monkeypatch.setattr(scaling, "MEMORY_FACTOR", 1e9)
    results = bench_scaling(TINY, console, cases="sizes", sizes="tiny", repeats=1)
    assert results["curves"]["sizes"]["points"] == []
    assert "GB of memory" in results["skipped"]["sizes tiny"]


@pytest.mark.parametrize(
    ("size", "least", "most"), [("135m", 133e6, 137e6), ("1b", 1.0e9, 1.2e9), ("7b", 8.1e9, 8.3e9)]
)
def test_sizes_have_the_number_of_parameters_of_their_names(size, least, most):
    assert least < BenchModel(size=size).num_parameters() < most


def test_the_number_of_parameters_is_that_of_the_loaded_model():
    assert TINY.num_parameters() == sum(weight.numel() for weight in TINY.load().parameters())


def test_bytes_of_the_cache(model):
    config = model.config
    per_position = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert cache_bytes(model, 10) == 10 * per_position * 2 * 4  # keys and values in float32


@pytest.mark.parametrize(
    ("options", "code", "value"),
    [
        ({"cases": "pictures"}, ErrorCode.UNKNOWN_NAME, "pictures"),
        ({"sizes": "8b"}, ErrorCode.UNKNOWN_NAME, "8b"),
        ({"sizes": ","}, ErrorCode.MISSING_VALUE, "--sizes"),
    ],
)
def test_invalid_options(console, options, code, value):
    with raises_input_error(code, value):
        bench_scaling(TINY, console, **options)


def test_sizes_need_scaling(run_cli):
    result = run_cli("bench", "--sizes", "tiny")
    assert result.exit_code == 2
    assert "--scaling" in result.stderr
