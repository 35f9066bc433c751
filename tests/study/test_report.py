"""Tables and figures are drawn from the results file alone."""

import json
import math

import pytest
from figures import layer_curves
from measures import category_scores
from paired import PairedDifference
from report import BEGIN, END, main, read_results, replace_part
from tables import (
    NOT_RUN,
    admits_sign,
    category_table,
    clear_differences,
    difference_table,
    power_table,
    score_table,
    scores_of,
)

from owl2.errors import ErrorCode
from tests.errors import raises_input_error

SETTINGS = {
    "arms": {"none": {"title": "no MAM"}, "full": {"title": None}, "later": {"title": "later"}},
    "baseline": "none",
    "main": ["none", "full"],
    "main_seeds": 3,
    "seeds": 2,
    "expected_sd": {"choice": 0.02},
}


def cell(arm, seed, choice, image):
    where = {"attention": {"image": image, "text": [1 - x for x in image]}}
    if arm == "full":
        where["distance"] = {"k_proj": [0.1, 0.2], "v_proj": [0.3, 0.4]}
        where["attention_text_weights"] = where["attention"]
    return {
        "arm": arm,
        "seed": seed,
        "metrics": {"choice": choice, "perplexity": 2.0 ** (1 + seed)},
        "replaced": {"choice": 0.25} if arm == "full" else {},
        "where": where,
        "machine": {"processor": "CPU", "cores": 2},
        "seconds": {"train": 1800.0, "evaluate": 1800.0},
    }


@pytest.fixture
def results():
    scores = {"none": (0.5, 0.6, 0.55), "full": (0.6, 0.75, 0.6)}
    cells = [
        cell(arm, seed, value, [0.1 * (seed + 1), 0.4])
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    ]
    start = {"metrics": {"choice": 0.25}}
    return {"settings": SETTINGS, "cells": cells, "start": start, "study": "test"}


def rows(table):
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines()]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_scores(results):
    table = rows(score_table(results))
    assert table["runs"] == {"before stage 2": "1", "no MAM": "3", "full": "3"}
    assert set(table) == {"runs", "choice", "perplexity", "choice, text K and V"}
    assert table["choice"]["before stage 2"] == "0.250"
    assert table["choice"]["no MAM"] == "0.550 ± 0.124"  # t(0.975, 2) = 4.303, SD 0.05
    assert table["perplexity"]["before stage 2"] == NOT_RUN
    assert table["choice, text K and V"]["no MAM"] == NOT_RUN
    assert "before stage 2" not in rows(score_table(results | {"start": None}))["choice"]
    assert scores_of(results)["log_perplexity"]["none"][1] == pytest.approx(2 * 0.6931472)


def test_scores_by_category(results, tmp_path):
    assert category_table(results) == ""
    tasks = {"test_choices": "choice", "test_exact": "exact", "test_probe": "probe"}
    for cell in results["cells"]:
        values = {"accuracy": cell["metrics"]["choice"], "accuracy_no_image": 0.1}
        found = {name: {"metrics": {}, "per_category": {}} for name in tasks}
        found["test_exact"]["per_category"] = {"color": values, "count": values}
        (tmp_path / "images.json").write_text(json.dumps(found))
        answers = [
            {"category": category, "answer_nll": nll, "answer_nll_no_image": 2.0}
            for category, nll in (("color", 0.5), ("count", 2.0), ("color", 1.5))
        ]
        (tmp_path / "responses").mkdir(exist_ok=True)
        file = tmp_path / "responses" / "answers.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in answers))
        cell["categories"] = category_scores(tmp_path)
    results["start"]["categories"] = {"exact": {"color": 0.125}}
    table = rows(category_table(results))
    assert set(table) == {
        f"{score}, {category}"
        for score in ("exact", "exact_no_image", "answer_nll", "answer_nll_no_image")
        for category in ("color", "count")
    }
    assert table["exact, color"] == {
        "before stage 2": "0.125", "no MAM": "0.550 ± 0.124", "full": "0.650 ± 0.215",
    }  # fmt: skip
    assert table["answer_nll, color"]["full"] == "1.000 ± 0.000"
    assert table["exact_no_image, count"]["full"] == "0.100 ± 0.000"
    assert table["exact, count"]["before stage 2"] == NOT_RUN


def test_differences(results):
    table = rows(difference_table(results))
    assert table["pairs"] == {"full": "3"}  # not the baseline and arms without runs
    assert table["choice"] == {"full": "+0.100 (-0.024 to +0.224)"}


def test_differences_that_remain_after_the_correction(results):
    """Ten scores: one with a clear difference, and one whose p-value is 0.02 before."""
    for one in results["cells"]:
        seed, is_full = one["seed"], one["arm"] == "full"
        one["replaced"] = {}
        one["metrics"] = {f"noise {i}": (seed + i) % 3 + is_full * (seed - 1) for i in range(8)}
        one["metrics"] |= {
            "clear": is_full * (1 + seed / 1e4),
            "borderline": is_full * (1 + seed / 4),
        }
    [found] = clear_differences(results)
    assert found.startswith("- full, of 10 scores: clear (p = ") and "borderline" not in found
    assert clear_differences({"settings": SETTINGS, "cells": []}) == []


def test_power(results):
    [row] = rows(power_table(results)).values()
    assert row["assumed SD"] == "0.02"
    assert row["observed SD"] == "0.05"
    assert row["detectable with it"] == "0.16"  # three pairs: 3.26 SD
    before = {"settings": SETTINGS, "cells": []}
    assert rows(power_table(before))["choice"]["observed SD"] == NOT_RUN


@pytest.mark.parametrize(
    ("low", "high", "reference", "expected"),
    [
        (-0.1, 0.3, 0.2, True),
        (-0.1, 0.3, -0.2, True),
        (-0.3, -0.1, 0.2, False),
        (-0.3, -0.1, -0.2, True),
        (0.1, 0.3, -0.2, False),
        (math.nan, math.nan, 0.2, True),
        (math.nan, math.nan, -0.2, False),
    ],
)
def test_sign_of_another_study(low, high, reference, expected):
    assert admits_sign(PairedDifference(0.1, low, high, 0.0, 2), reference) is expected


def test_comparison_of_two_studies(results, tmp_path, monkeypatch, capsys):
    other = json.loads(json.dumps(results))
    for one in other["cells"]:
        if one["arm"] == "full":
            one["metrics"]["choice"] -= 0.5
    for name, content in (("one", results), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [tmp_path / "one.json", "--compare", tmp_path / "other.json"]
    assert run_main(monkeypatch, *files) == 1  # the intervals do not overlap
    [row] = [line for line in capsys.readouterr().out.splitlines() if "full, choice |" in line]
    assert "+0.100" in row and "-0.400" in row and "| yes |" in row
    assert run_main(monkeypatch, files[0], "--compare", files[0]) == 0
    for one in results["cells"]:  # an interval without width
        one["metrics"]["choice"] = 0.5 + 0.25 * (one["arm"] == "full")
    (tmp_path / "one.json").write_text(json.dumps(results))
    assert run_main(monkeypatch, *files) == 0
    for one in results["cells"]:
        del one["metrics"]["choice"]
    (tmp_path / "one.json").write_text(json.dumps(results))
    assert run_main(monkeypatch, *files) == 2


def test_curves_by_layer(results):
    curves = layer_curves(results, "attention", "image")
    assert [mean for mean, _ in curves["none"]] == pytest.approx([0.2, 0.4])
    assert curves["none"][1][1] == pytest.approx(0, abs=1e-9)
    assert list(layer_curves(results, "distance", "v_proj")) == ["full"]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
    return main()


def test_figures_and_document(results, tmp_path, monkeypatch):
    path, document = tmp_path / "results.json", tmp_path / "study.md"
    path.write_text(json.dumps(results))
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    output = tmp_path / "study"
    assert run_main(monkeypatch, path, "--output", output, "--document", document) == 0
    for name in ("differences", "attention", "distances"):
        assert (output / f"{name}.svg").stat().st_size > 5000
        assert "<dc:date>" not in (output / f"{name}.svg").read_text()
        assert f"](study/{name}.svg)" in document.read_text()
    assert "Not run yet: later." in document.read_text()
    assert "6 of 8 runs" in document.read_text() and "6.0 hours" in document.read_text()
    assert "old" not in document.read_text() and document.read_text().endswith("after\n")
    first = [document.read_text(), *(file.read_bytes() for file in sorted(output.glob("*.svg")))]
    assert run_main(monkeypatch, path, "--output", output, "--document", document) == 0
    again = [document.read_text(), *(file.read_bytes() for file in sorted(output.glob("*.svg")))]
    assert again == first


def test_a_study_before_its_first_run(results, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results | {"cells": [], "start": None}))
    assert run_main(monkeypatch, path) == 0
    assert not list(tmp_path.glob("*.svg"))
    assert "0 of 8 runs" in (tmp_path / "report.md").read_text()


def test_files_that_are_no_results(tmp_path, monkeypatch):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with raises_input_error(ErrorCode.INVALID_FORMAT, "other.json"):
        read_results(path)
    assert run_main(monkeypatch, path) == 2
    with raises_input_error(ErrorCode.INVALID_FORMAT, BEGIN):
        replace_part("no part", "text")
