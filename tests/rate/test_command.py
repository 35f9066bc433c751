"""`owl2 rate`: scores of folders, files and lists, as JSONL, CSV and HTML."""

import csv
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode
from owl2.rate.command import RateConfig, rate
from owl2.scoring.scorer import ImageScorer
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY, image_files, read

NAMES = ["wide", "tall", "square", "large"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for file in image_files("one_align", NAMES):
        shutil.copy(file, folder / "more" if file.stem == "large" else folder)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    args = ModelArgs(str(FAMILY / "one_align" / "model"), "cpu", "float32")
    return RateConfig([folder], args, tmp_path / "out" / "scores.jsonl", recursive=True)


def run(config, **changes):
    console = Console(file=io.StringIO(), width=200, highlight=False)
    rate(replace(config, **changes), console)
    return console.file.getvalue()


def rows(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def golden(key="quality.image", value="score_1_to_5"):
    case = read("one_align", "scores.json")[key]
    return dict(zip(case["pictures"], case[value], strict=True))


def by_name(found):
    return {re.split(r"[/.]", row["image"])[-2]: row["score"] for row in found}


def test_records_csv_and_page(config, folder, tmp_path, run_cli):
    command = ["rate", folder, "--recursive", "--model", config.model_args.model, "--device", "cpu"]
    csv_file, page = tmp_path / "out" / "scores.csv", tmp_path / "out" / "scores.html"
    options = ["--dtype", "float32", "--output-file", csv_file, "--html", page, "--batch-size", 3]
    result = run_cli(*command, *options)
    assert result.exit_code == 0, result.stderr
    found = rows(csv_file.with_suffix(".jsonl"))
    assert by_name(found) == pytest.approx(golden(), abs=1e-4)
    assert [row["image"] for row in found] == sorted(str(path) for path in folder.rglob("*.png"))
    for row in found:
        assert list(row) == ["image", "score", "probabilities", "std"]
        assert list(row["probabilities"]) == ["excellent", "good", "fair", "poor", "bad"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    with csv_file.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for line, row in zip(table, found, strict=True):
        assert line["image"] == row["image"]
        assert float(line["score"]) == row["score"]
        assert float(line["poor"]) == row["probabilities"]["poor"]
    text = page.read_text("utf-8")
    shown = [float(value) for value in re.findall(r"<b>([\d.]+)</b>", text)]
    assert shown == pytest.approx(sorted(golden().values(), reverse=True), abs=1e-3)
    assert text.count("data:image/jpeg;base64,") == 4


def test_resume_and_changed_images(config, folder, monkeypatch):
    run(config)
    first, computed = rows(config.output), []
    score = ImageScorer.score_iter

    def record(self, items, *options):
        items = list(items)
        computed.extend(path.stem for path in items)
        return score(self, items, *options)

    monkeypatch.setattr(ImageScorer, "score_iter", record)
    run(config)
    assert computed == []
    Image.new("RGB", (30, 20), "red").save(folder / "tall.png")
    run(config)
    assert computed == ["tall"]
    changed = [row for row, old in zip(rows(config.output), first, strict=True) if row != old]
    assert list(by_name(changed)) == ["tall"]
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "task"):
        run(config, task="aesthetics")


def test_processes_share_the_images(config, monkeypatch):
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(config)
        assert config.output.exists() == (rank == 0)
    assert by_name(rows(config.output)) == pytest.approx(golden(), abs=1e-4)


def test_lists_files_and_errors(config, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    names = ["images/wide.png", "images/more/large.png", "images/broken.png", "images/absent.png"]
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "1 of 5"):
        run(config, sources=[listed, folder / "tall.png"], html=tmp_path / "page.html")
    expected = {name: score for name, score in golden().items() if name != "square"}
    assert by_name(rows(config.output)) == pytest.approx(expected, abs=1e-4)
    report = json.loads(config.output.with_name("scores.report.json").read_text())
    codes = {row["file_name"].split("/")[-1]: row["code"] for row in report["errors"]}
    assert codes == {
        "broken.png": ErrorCode.BROKEN_IMAGE,
        "absent.png": ErrorCode.MISSING_IMAGE,
    }
    assert (tmp_path / "page.html").exists()
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "nowhere"):
        run(config, sources=[tmp_path / "nowhere"])
    listed.write_text('{"file": "x.png"}\n')
    with raises_input_error(ErrorCode.MISSING_VALUE, "line 1"):
        run(config, sources=[listed])


def test_videos(config, tmp_path):
    """An animation of three seconds: the frames at 0, 1 and 2 seconds."""
    frames = [Image.open(file) for file in image_files("one_align", ["frame0", "frame1", "frame2"])]
    repeated = [frame for frame in frames for _ in range(4)]
    first, *others = repeated
    first.save(
        tmp_path / "clip.webp", save_all=True, append_images=others, duration=250, lossless=True
    )
    run(config, sources=[tmp_path / "clip.webp"], kind="video")
    [expected] = read("one_align", "scores.json")["quality.video.three"]["score_1_to_5"]
    assert rows(config.output)[0]["score"] == pytest.approx(expected, abs=1e-4)
    with raises_input_error(ErrorCode.EMPTY_DATASET, "mp4"):
        run(config, kind="video")


def test_a_prompt_of_the_user_may_ask_for_another_task(config):
    changes = {"method": "deqa-score", "task": "aesthetics"}
    with raises_input_error(ErrorCode.UNSUPPORTED, "aesthetics"):
        run(config, **changes)
    run(config, prompt_form="USER: <|image|>Rate the {task}. ASSISTANT: The {task} is", **changes)
    assert len(rows(config.output)) == len(NAMES)


def test_compare2score(config, tmp_path):
    anchors = tmp_path / "anchors"
    anchors.mkdir()
    case = read("compare2score", "scores.json")
    for file in image_files("compare2score", case["anchors"]):
        shutil.copy(file, anchors)
    (anchors / "._1.png").touch()  # a file of macOS
    sources = image_files("compare2score", case["pictures"])
    args = ModelArgs(str(FAMILY / "compare2score" / "model"), "cpu", "float32")
    run(config, sources=sources, model_args=args, anchors=anchors)
    found = rows(config.output)
    expected = {name: one["score"] for name, one in case["pictures"].items()}
    assert by_name(found) == pytest.approx(expected, abs=2e-3)
    assert list(found[0]) == ["image", "score", "preferences"]
    moved = shutil.move(anchors, tmp_path / "moved")
    changes = {"sources": sources, "model_args": args, "anchors": moved}
    run(config, **changes)
    first, second, *_ = sorted(moved.glob("[!.]*"))
    shutil.copy(first, second)
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "another anchors"):
        run(config, **changes)
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "5 anchor images"):
        run(config, sources=sources, model_args=args, output=tmp_path / "other.jsonl")


def test_vllm_gets_the_same_prompts(config, monkeypatch, family_engine):
    engine = family_engine("one_align")

    def make(model, **settings):
        assert (model, settings) == (config.model_args.model, {"dtype": "float32"})
        return SimpleNamespace(
            processor=engine.processor,
            next_token_logits=engine.next_token_logits,
            close=lambda: closed.append(model),
        )

    closed = []
    module = SimpleNamespace(VllmEngine=make)
    monkeypatch.setitem(sys.modules, "owl2.vllm_plugin.offline", module)
    args = ModelArgs(config.model_args.model, activation_bits=8)
    for changes in ({}, {"model_args": args}):
        with raises_input_error(ErrorCode.CONFLICT, "--device"):
            run(config, engine="vllm", **changes)
    run(config, engine="vllm", model_args=ModelArgs(config.model_args.model, dtype="float32"))
    assert by_name(rows(config.output)) == pytest.approx(golden(), abs=1e-4)
    assert closed == [config.model_args.model]
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "sglang"):
        run(config, engine="sglang")
