"""The report and its plot, from results.json alone."""

import json

import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.eval.report import format_value, ratios_to_paper, results_table, write_report
from tests.errors import raises_input_error


def entry(title, suite, main, value, paper=None, scale=100.0, **changes):
    return {
        "metrics": {} if value is None else {main: value},
        "n": 12,
        "title": title,
        "suite": suite,
        "main_metric": main,
        "paper": {} if paper is None else {main: paper},
        "published": {},
        "scale": scale,
        "digits": 2,
        "note": "",
        "limit": None,
        "invalid": {"n": 0, "first": []},
        "preprocessing": {"size": 448, "policy": "resize"},
        "generation": {"dtype": "bfloat16", "mam": True},
        "versions": {"owl2": "1"},
    } | changes


@pytest.fixture
def results():
    tasks = {
        "vqav2": entry("VQAv2", "vqa", "accuracy", 0.794, 79.4),
        "mme": entry("MME", "mllm", "perception", 725.095, 1450.19, scale=1.0),
        "gqa": entry("GQA", "vqa", "accuracy", 0.6, 56.1, limit=50, note="testdev"),
        "mm_vet": entry("MM-Vet", "mllm", "score", None, 36.2),
        "mine": entry("mine|<b>.jsonl", None, "accuracy", 0.5),
    }
    return {
        "model": "runs/x",
        "weights_fingerprint": "f" * 64,
        "environment": {"name": "cpu", "processes": 1},
        "tasks": tasks,
        "skipped": {"coco": "dataset_coco.json is missing"},
    }


@pytest.fixture
def written(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    return tmp_path


def test_markdown_has_our_results_and_those_of_the_paper(written):
    text = (written / "report.md").read_text()
    assert "| VQAv2 (vqav2) | accuracy | 12 | 79.40% | 79.4 | +0.00 |" in text
    assert "| MME (mme) | perception | 12 | 725.10 | 1450.19 | -725.10 |" in text
    assert "| GQA (gqa) | accuracy | 12 | 60.00% | 56.1 | +3.90 |" in text
    assert "only 50 samples, of all categories; testdev" in text
    assert "| MM-Vet (mm_vet) | score | 12 | to be judged | 36.2 |" in text
    assert "mine\\|<b>.jsonl (mine)" in text
    assert "| coco | dataset_coco.json is missing |" in text
    assert text.index("## Visual question answering") < text.index("## Multimodal benchmarks")
    assert "radar.png" in text


def test_html_contains_the_plot(written):
    page = (written / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "mine|&lt;b&gt;.jsonl" in page
    assert "<b>.jsonl" not in page
    with Image.open(written / "radar.png") as radar:
        assert radar.width > 500


def test_ratios_to_the_paper_use_the_main_metric(results):
    ratios = ratios_to_paper(results)
    assert ratios == pytest.approx({"vqav2": 1.0, "mme": 0.5, "gqa": 60 / 56.1})
    paper, metrics = {"score": 2.0, "rate": 0.5}, {"score": 1.0, "rate": 0.25}
    both = entry("M", "mllm", "score", 1.0, scale=1) | {"paper": paper, "metrics": metrics}
    results["tasks"] = {"m": both}
    assert ratios_to_paper(results) == {"m": 0.5}


def test_too_few_results_for_a_radar_plot(written, results):
    del results["tasks"]["gqa"]
    (written / "results.json").write_text(json.dumps(results))
    write_report(written)
    assert not (written / "radar.png").exists(), "that of an earlier report is removed"
    assert "radar.png" not in (written / "report.md").read_text()


def test_values_have_the_unit_of_the_paper():
    assert format_value(0.5, {"scale": 100, "digits": 2}) == "50.00%"
    assert format_value(2.17, {"scale": 1, "digits": 4}) == "2.1700"


def test_table_of_a_task(plain):
    result = {
        "metrics": {"accuracy": 0.5, "unparsed": 0.1, "accuracy_no_image": 0.25},
        "n": 1200,
        "scale": 100,
        "digits": 2,
        "published": {},
        "per_category": {"a": {"n": 1, "accuracy": 1.0, "unparsed": 0.0}},
    }
    plain.print(results_table("task", result))
    text = plain.file.getvalue()
    for needle in ("accuracy, no image", "25.00%", "1,200", "unparsed", "10.00%"):
        assert needle in text


def test_column_of_the_baseline_of_a_single_metric(plain):
    result = {"metrics": {"accuracy": 0.5, "accuracy_no_image": 0.25}, "n": 3}
    result |= {"scale": 100, "digits": 2, "published": {}}
    plain.print(results_table("task", result))
    assert " no image " in plain.file.getvalue()
    assert "accuracy, no image" not in plain.file.getvalue()


def test_missing_results_are_an_error(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "results.json"):
        write_report(tmp_path)
