"""Tables and plots from results.json alone."""

import json

import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.eval.report import paper_shares, results_table, shown, write_report


def entry(title, suite, main, value, paper=None, scale=100.0, **changes):
    return {
        "metrics": {} if value is None else {main: value},
        "n": 12,
        "title": title,
        "suite": suite,
        "main": main,
        "figures": {} if paper is None else {main: {"paper": paper, "scale": scale}},
        "scale": scale,
        "note": "",
        "limit": None,
        "broken": {"n": 0, "first": []},
        "preprocessing": {"size": 448, "policy": "resize"},
        "decoding": {"dtype": "bfloat16", "mam": True},
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
        "fingerprint": "f" * 64,
        "machine": {"name": "cpu", "processes": 1},
        "tasks": tasks,
        "skipped": {"coco": "dataset_coco.json is not there"},
    }


@pytest.fixture
def written(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    return tmp_path


def test_the_papers_figures_beside_ours(written):
    text = (written / "report.md").read_text()
    assert "| VQAv2 (vqav2) | accuracy | 12 | 79.40% | 79.4 | +0.00 |" in text
    assert "| MME (mme) | perception | 12 | 725.10 | 1450.19 | -725.10 |" in text
    assert "| GQA (gqa) | accuracy | 12 | 60.00% | 56.1 | +3.90 |" in text
    assert "only the first 50 questions; testdev" in text
    assert "| MM-Vet (mm_vet) | score | 12 | to be judged | 36.2 |" in text
    assert "mine\\|<b>.jsonl (mine)" in text
    assert "| coco | dataset_coco.json is not there |" in text
    assert text.index("## Visual question answering") < text.index("## Multimodal benchmarks")
    assert "radar.png" in text


def test_one_page_with_the_plot_in_it(written):
    page = (written / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "mine|&lt;b&gt;.jsonl" in page
    assert "<b>.jsonl" not in page
    with Image.open(written / "radar.png") as radar:
        assert radar.width > 500


def test_shares_of_the_papers_figures(results):
    shares = paper_shares(results)
    assert shares == pytest.approx({"vqav2": 1.0, "mme": 0.5, "gqa": 60 / 56.1})
    rate = {"score": {"paper": 2.0, "scale": 1.0}, "rate": {"paper": 0.5, "scale": 1.0}}
    both = {"score": 1.0, "rate": 0.25}
    results["tasks"] = {"m": entry("M", "mllm", "score", 1.0, figures=rate, metrics=both, scale=1)}
    assert paper_shares(results) == {"m": 0.5}, "of a rate of errors, less is better"


def test_too_few_figures_make_no_radar_plot(written, results):
    del results["tasks"]["gqa"]
    (written / "results.json").write_text(json.dumps(results))
    write_report(written)
    assert not (written / "radar.png").exists(), "that of an earlier report"
    assert "radar.png" not in (written / "report.md").read_text()


def test_values_as_the_paper_tells_them():
    assert shown(0.5, {"scale": 100}) == "50.00%"
    assert shown(2.17, {"scale": 1}) == "2.17"


def test_a_table_of_a_task(plain):
    result = {
        "metrics": {"accuracy": 0.5, "unparsed": 0.1, "accuracy_blind": 0.25},
        "n": 1200,
        "scale": 100,
        "by_answer_kind": {"a": {"n": 1, "accuracy": 1.0, "unparsed": 0.0}},
    }
    plain.print(results_table("task", result))
    text = plain.file.getvalue()
    for words in ("accuracy, blind", "25.00%", "1,200", "unparsed", "10.00%"):
        assert words in text


def test_the_only_metric_is_called_blind(plain):
    result = {"metrics": {"accuracy": 0.5, "accuracy_blind": 0.25}, "n": 3, "scale": 100}
    plain.print(results_table("task", result))
    assert " blind " in plain.file.getvalue()
    assert "accuracy, blind" not in plain.file.getvalue()


def test_no_run_there(tmp_path):
    with pytest.raises(InputError, match=r"results\.json"):
        write_report(tmp_path)
