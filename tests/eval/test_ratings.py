"""Tasks of scoring models: from label files to the correlations, with the golden checkpoints."""

import csv
import io
import json
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode
from owl2.eval import evaluate as evaluate_module
from owl2.eval.evaluate import EvalConfig, estimate, evaluate
from owl2.scoring.agreement import score_agreement
from owl2.scoring.scorer import ImageScorer
from owl2.workers import WorkerRank
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY, image_files, read

NAMES = ["wide", "tall", "square", "large"]
MOS = {"wide": 2.0, "tall": 3.5, "square": 1.0, "large": 4.0}
VIDEOS = {"one": 2.0, "two": 4.0, "three": 3.0}


def video_case(number):
    return read("one_align", "scores.json")[f"vqa_eval.{number}"]


@pytest.fixture
def data(tmp_path):
    """AGIQA-3K, AVA and KoNViD-1k with the golden images; one image is missing."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for file in image_files("one_align", NAMES):
        shutil.copy(file, folder / "images")
    rows = [{"name": f"{name}.png", "mos_quality": mos} for name, mos in MOS.items()]
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "mos_quality"])
        writer.writeheader()
        writer.writerows([*rows, {"name": "missing.png", "mos_quality": 3}])
    ava = [{"image": f"ava_images/{name}.png", "gt_score": mos} for name, mos in MOS.items()]
    (folder / "test_ava.json").write_text(json.dumps(ava))
    lines = ["flickr_id,mos"]
    for number, mos in VIDEOS.items():  # each is a folder with its frames
        frames = folder / "KoNViD_1k_videos" / number
        frames.mkdir(parents=True)
        for file in image_files("one_align", video_case(number)["frames"]):
            shutil.copy(file, frames)
        lines.append(f"{number},{mos}")
    (folder / "KoNViD_1k_mos.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "has_matplotlib", lambda: False)
    args = ModelArgs(str(FAMILY / "one_align" / "model"), "cpu", "float32")
    return EvalConfig(args, tmp_path / "out", "agiqa_3k,ava", data=data, batch_size=3)


def run(config, **changes):
    console = Console(file=io.StringIO(), width=200, highlight=False)
    results = evaluate(replace(config, **changes), console)
    return results, console.file.getvalue()


def responses(config, task):
    lines = (config.output / "responses" / f"{task}.jsonl").read_text().splitlines()
    return {row["images"][0].split("/")[-1].split(".")[0]: row for row in map(json.loads, lines)}


def found_scores(config, task):
    rows = responses(config, task)
    return {name: row["metadata"]["scores"]["score"] for name, row in rows.items()}


@pytest.mark.parametrize(("task", "key"), [("agiqa_3k", "iqa_eval"), ("ava", "iaa_eval")])
def test_scores_are_those_of_the_evaluation_scripts(config, task, key):
    results, printed = run(config, tasks=task)
    case = read("one_align", "scores.json")[key]
    golden = dict(zip(case["pictures"], case["score_0_to_1"], strict=True))
    assert found_scores(config, task) == pytest.approx(golden, abs=1e-4)
    result = results["tasks"][task]
    expected = score_agreement([golden[name] for name in MOS], list(MOS.values()))
    assert result["metrics"]["SRCC"] == pytest.approx(expected.srcc)
    assert result["metrics"]["PLCC"] == pytest.approx(expected.plcc, abs=1e-2)
    assert result["invalid"]["n"] == (task == "agiqa_3k")
    # The golden checkpoint names the model that it is a small copy of.
    assert result["paper"] == result["published"]["q-future/one-align"]
    assert set(result["paper"]) == {"SRCC", "PLCC"}
    assert "q-future/one-align, published" in printed
    assert "q-future/one-align" in (config.output / "report.md").read_text()
    assert f"{expected.srcc:.4f}" in printed


def test_videos_at_one_placeholder(config):
    results, _ = run(config, tasks="konvid")
    rows = (config.output / "responses" / "konvid.jsonl").read_text().splitlines()
    found = {row["id"]: row["metadata"]["scores"]["score"] for row in map(json.loads, rows)}
    golden = {number: video_case(number)["score_0_to_1"][0] for number in VIDEOS}
    assert found == pytest.approx(golden, abs=1e-4)
    assert all(json.loads(row)["prompt"].count("<|image|>") == 1 for row in rows)
    assert results["tasks"]["konvid"]["n"] == 3


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({"prompts": "plain"}, "hub"),
        ({"prompt": "USER: <|image|> Is it a good photo? ASSISTANT: It is"}, None),
    ],
)
def test_other_prompts(config, changes, form):
    run(config, tasks="agiqa_3k", **changes)
    options = {"prompt_form": form or changes["prompt"]}
    scorer = ImageScorer.from_pretrained(config.model_args.model, "cpu", "float32", **options)
    scores = [one.score for one in scorer.score(image_files("one_align", NAMES))]
    found = found_scores(config, "agiqa_3k")
    assert [found[name] for name in NAMES] == pytest.approx(scores, abs=1e-5)


def test_resume_with_several_processes_equals_one(config, monkeypatch, tmp_path):
    one, _ = run(config)
    shared = replace(config, output=tmp_path / "shared")
    rated = []
    score_iter = ImageScorer.score_iter

    def count(self, items, *args, **options):
        rated.extend(items)
        return score_iter(self, items, *args, **options)

    monkeypatch.setattr(ImageScorer, "score_iter", count)
    assert evaluate(shared, worker=WorkerRank(1, 2)) == {}
    assert len(rated) == 4  # half of the images of each task
    results = evaluate(shared, worker=WorkerRank(0, 2))
    assert len(rated) == 8
    for task in ("agiqa_3k", "ava"):
        expected = one["tasks"][task]["metrics"]
        assert results["tasks"][task]["metrics"] == pytest.approx(expected, abs=1e-4)


def test_compare2score_needs_anchors(config, tmp_path):
    case = read("compare2score", "scores.json")
    anchors, images = tmp_path / "anchors", config.data / "images"
    anchors.mkdir()
    for file in image_files("compare2score", case["anchors"]):
        shutil.copy(file, anchors)
    names = list(case["pictures"])
    for file in image_files("compare2score", names):
        shutil.copy(file, images)
    lines = [f"{index} {name}.png" for index, name in enumerate(names)]
    (config.data / "mos_with_names.txt").write_text("\n".join(lines))
    args = ModelArgs(str(FAMILY / "compare2score" / "model"), "cpu", "float32")
    config = replace(config, tasks="tid2013", model_args=args)
    shutil.copytree(images, config.data / "distorted_images")
    with raises_input_error(ErrorCode.EMPTY_DATASET, "anchor"):
        run(config)
    results, _ = run(config, anchors=anchors)
    assert results["tasks"]["tid2013"]["n"] == len(names)
    run(config, anchors=anchors, prompts="plain")
    golden = {name: one["score"] for name, one in case["pictures"].items()}
    assert found_scores(config, "tid2013") == pytest.approx(golden, rel=1e-3)


def test_models_without_the_task_are_skipped_with_the_nearest_one(config):
    chat = ModelArgs(str(FAMILY / "co_instruct" / "model"), "cpu", "float32")
    with raises_input_error(ErrorCode.EMPTY_DATASET, "q-future/one-align"):
        run(config, model_args=chat)
    deqa = ModelArgs(str(FAMILY / "deqa_score" / "model"), "cpu", "float32")
    results, _ = run(config, model_args=deqa)
    assert "one-align" in results["skipped"]["ava"]
    assert results["tasks"]["agiqa_3k"]["paper"] == {"SRCC": 0.745, "PLCC_fit": 0.808}


def test_tasks_that_the_model_cannot_answer_are_skipped_before_their_data(config, tmp_path):
    def model(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return ModelArgs(str(folder), "cpu")

    for name, task, nearest in (
        ("co-instruct", "docvqa", "mPLUG/DocOwl1.5-Omni"),
        ("q-instruct-mplug-owl2-1031", "doc_textvqa", "mPLUG/DocOwl2"),
        ("one-align", "docvqa", "owl2 rate"),
        ("one-align", "textvqa", "q-future/co-instruct"),
        ("co-instruct", "textvqa", "--data"),
        ("mplug-owl2-llama2-7b", "docvqa", "--data"),
    ):
        with raises_input_error(ErrorCode.EMPTY_DATASET, nearest):
            run(config, model_args=model(name), tasks=task, data=None)


def test_limit_has_no_published_results(config):
    results, _ = run(config, tasks="agiqa_3k", limit=2)
    result = results["tasks"]["agiqa_3k"]
    assert (result["n"], result["paper"], result["published"]) == (2, {}, {})


def test_estimate(config):
    found = estimate(config, Console(file=io.StringIO()))
    assert found["ava"]["questions"] == found["ava"]["images"] == 4
    assert found["ava"]["new tokens (max)"] == 0


def test_list_names_the_published_results_and_the_missing_files(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "koniq").mkdir()
    (tmp_path / "koniq" / "test_koniq.json").write_text("[]")
    result = run_cli("eval", "--list", "--data", tmp_path)
    rows = {line.split()[3]: line for line in result.stdout.splitlines() if "scoring" in line}
    assert "one-align: SRCC 0.941, PLCC 0.95" in rows["koniq"]
    assert ("found" in rows["koniq"], "missing" in rows["spaq"]) == (True, True)


def test_opinion_scores_of_your_own(config, tmp_path):
    rows = [{"image": f"images/{name}.png", "mos": mos} for name, mos in MOS.items()]
    rows[0]["category"] = "first"  # a single image has no correlation
    invalid = [{"image": "images/wide.png", "mos": "3"}, {"question": "?", "answers": ["a"]}]
    file = config.data / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, *invalid])))
    results, _ = run(config, tasks=str(file))
    result = results["tasks"]["own"]
    assert (result["n"], result["invalid"]["n"], result["published"]) == (4, 2, {})
    assert [own["n"] for own in result["per_category"].values()] == [3]
    expected, _ = run(config, tasks="agiqa_3k", output=tmp_path / "other")
    assert result["metrics"] == pytest.approx(expected["tasks"]["agiqa_3k"]["metrics"])
