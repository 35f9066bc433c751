"""Captions, samples with short answers and ScienceQA in their published formats."""

import json
import shutil

import pytest
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics.captions import FALLBACK
from owl2.eval.samples import Response
from owl2.eval.tasks import find_tasks
from tests.errors import raises_input_error
from tests.eval.reading import FIXTURES, SHORT

NAMES = ["coco", "flickr30k", "gqa", "okvqa", "science_qa", "textvqa", "vizwiz", "vqav2"]
CAPTION = "Provide a one-sentence caption for the provided image."


def read(name, data=FIXTURES, prompt=None):
    [task] = find_tasks(name)
    if task.metric.name == "cider":
        pytest.importorskip("pycocoevalcap")
    source = task.data(data, prompt)
    return task.read(source), source


def by_id(name):
    (samples, _), _ = read(name)
    return {sample.id: sample for sample in samples}


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixtures, and a function that changes a JSON file in it."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)

    def change(file, function):
        path = tmp_path / file
        content = json.loads(path.read_text(encoding="utf-8"))
        changed = function(content)
        path.write_text(json.dumps(content if changed is None else changed), encoding="utf-8")
        return tmp_path

    return change


def test_suites_contain_all_benchmarks_with_the_results_of_the_paper():
    names = [task.name for suite in ("captions", "vqa") for task in find_tasks(None, suite)]
    assert sorted(names) == NAMES
    paper = [value for name in NAMES for value in find_tasks(name)[0].config.paper.values()]
    assert paper == [137.3, 85.1, 56.1, 57.7, 68.7, 54.3, 54.5, 79.4]


@pytest.mark.parametrize("name", NAMES)
def test_all_images_exist_and_precede_the_text(name):
    (samples, _), source = read(name)
    assert samples
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        [turn] = sample.messages
        image, text = turn["content"]
        assert Image.open(image["path"]).size[0] > 1
        assert text["type"] == "text"
        assert sample.question in text["text"]
    assert source.files
    assert all(path.is_file() for path in source.files)


@pytest.mark.parametrize("name", NAMES)
def test_expected_answers_have_the_best_score(name, monkeypatch):
    monkeypatch.setattr("owl2.eval.metrics.captions.TOKENIZER", FALLBACK)
    [task] = find_tasks(name)
    (samples, _), _ = read(name)
    answers = [Response(sample, "", sample.expected[0]) for sample in samples]
    best = task.metric.score(answers)
    assert best.metrics[task.metric.main] > 0.9
    assert all(0 <= score <= 1 for score in best.per_sample)
    wrong = task.metric.score([Response(sample, "", "zebra") for sample in samples])
    assert wrong.metrics[task.metric.main] == 0
    assert set(task.config.paper) <= set(best.metrics)


def test_captions():
    (samples, invalid), source = read("coco")
    assert [sample.id for sample in samples] == ["1101", "1102"]
    assert samples[0].messages[0]["content"][1]["text"] == CAPTION
    assert samples[0].expected[1] == "Nothing but a red wall."
    assert len(samples[1].expected) == 5
    [missing] = invalid
    assert missing.id == "1199"
    assert "val2014/COCO_val2014_000000001199.jpg" in missing.reason
    assert source.files == [FIXTURES / "coco" / "dataset_coco.json"]
    (samples, invalid), _ = read("flickr30k")
    assert [sample.id for sample in samples] == ["2201.jpg", "2203.jpg"]
    assert [item.id for item in invalid] == ["2204.jpg"]
    # The prompt "short" is the question alone, which is the request.
    (samples, _), _ = read("coco", prompt="short")
    assert samples[0].messages[0]["content"][1]["text"] == CAPTION
    (samples, _), _ = read("coco", prompt="What is it?")
    assert samples[0].question == "What is it?"


def test_vqav2():
    (samples, invalid), source = read("vqav2")
    assert [sample.id for sample in samples] == ["1101000", "1101001", "1102000"]
    assert [sample.category for sample in samples] == ["yes/no", "number", "other"]
    walls = samples[1]
    assert walls.question == "How many walls are there?"
    assert walls.messages[0]["content"][1]["text"] == walls.question + SHORT
    assert walls.expected == (*["1"] * 6, "2", "2", "0", "3")
    assert [item.id for item in invalid] == ["1199000"]
    assert len(source.files) == 2


def test_okvqa():
    sample = by_id("okvqa")["11020"]
    assert sample.category == "Science and Technology"
    assert sample.expected[:4] == ("scattering", "scattering", "scatter", "scatter")
    assert len(sample.expected) == 10


def test_gqa():
    samples = by_id("gqa")
    assert [sample.category for sample in samples.values()] == ["open", "binary", "binary"]
    assert samples["20003"].expected == ("t-shirt",)
    [task] = find_tasks("gqa")
    said = {"T-shirt.": 1.0, "tshirt": 0.0, "the t-shirt": 0.0}
    for text, score in said.items():
        assert task.metric.score([Response(samples["20003"], "", text)]).per_sample == [score]


def test_vizwiz():
    samples = by_id("vizwiz")
    assert [sample.category for sample in samples.values()] == ["other", "unanswerable"]
    assert samples["VizWiz_val_00000001.jpg"].expected.count("grey") == 6


def test_textvqa():
    (samples, invalid), _ = read("textvqa")
    assert [sample.id for sample in samples] == ["34602", "34603"]
    assert samples[0].messages[0]["content"][1]["text"] == "what does the sign say?" + SHORT
    assert [item.id for item in invalid] == ["34604"]


def test_science_qa():
    (samples, invalid), _ = read("science_qa")
    hot, sea = samples
    assert (hot.id, hot.category, hot.expected) == ("11", "natural science", ("B",))
    assert hot.messages[0]["content"][1]["text"] == (
        "Context: The image shows lava.\nWhich of these is hotter?\nA. ice\nB. lava\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert hot.question == "Which of these is hotter?"
    assert sea.messages[0]["content"][1]["text"].startswith("Which sea is shown?\nA. the North")
    assert sea.metadata["options"][3] == "the Black Sea"
    assert [item.id for item in invalid] == ["14"], "12 has no image and is not part of IMG"


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named_with_their_origin(name, tmp_path):
    needles = (tmp_path / name, "https://", "license: ")
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, *needles):
        read(name, tmp_path)


@pytest.mark.parametrize(("name", "count"), [("coco", 2), ("vqav2", 3)])
def test_images_may_be_next_to_the_file(copy, name, count):
    data = copy("coco/dataset_coco.json", lambda content: None)
    for image in (data / "val2014").iterdir():
        image.rename(data / name / image.name)
    (samples, _), _ = read(name, data)
    assert len(samples) == count


def test_captions_need_the_package_for_cider(monkeypatch):
    monkeypatch.setattr("owl2.eval.metrics.captions.find_spec", lambda name: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "pycocoevalcap"):
        read("coco")


def _no_answers(content):
    content["annotations"][0]["answers"] = [{"answer": " "}]


def _no_captions(content):
    content["images"][0]["sentences"] = []


def _no_such_choice(content):
    content["11"]["answer"] = 2


def _fewer(content):
    del content["annotations"][2]


def _odd(content):
    content["annotations"][2]["question_id"] = [1]


def _unknown(content):
    content["test"].append("99")


@pytest.mark.parametrize(
    ("name", "file", "change", "reason"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", _no_answers, "answers are empty"),
        ("coco", "dataset_coco.json", _no_captions, "no reference caption"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", _fewer, "no answer to question 1102000"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", _odd, "no answer to question 1102000"),
        ("science_qa", "problems.json", _no_such_choice, "answer 2 is not one of the 2"),
        ("science_qa", "pid_splits.json", _unknown, "problems.json"),
    ],
)
def test_invalid_samples_are_reported(copy, name, file, change, reason):
    (samples, invalid), _ = read(name, copy(f"{name}/{file}", change))
    assert any(reason in item.reason for item in invalid)
    assert samples, "the other samples are read"


def _other_split(content):
    content["data_subtype"] = "train2014"


def _no_test(content):
    content["images"] = content["images"][1:2]


@pytest.mark.parametrize(
    ("name", "file", "change", "needle"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", _other_split, "train2014"),
        ("okvqa", "OpenEnded_mscoco_val2014_questions.json", _other_split, "train2014"),
        ("coco", "dataset_coco.json", _no_test, "no split 'test'"),
        ("gqa", "testdev_balanced_questions.json", lambda _: {"1": {}}, "'1': 'imageId'"),
        ("vizwiz", "val.json", lambda _: [{"image": 1}], "row 1: 'image' is 1"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda _: {"data": [{}]}, "data 1: 'question_id'"),
    ],
)
def test_files_with_another_format(copy, name, file, change, needle):
    data = copy(f"{name}/{file}", change)
    with pytest.raises(InputError) as caught:
        read(name, data)
    assert needle in str(caught.value)
    assert str(data / name) in str(caught.value)
