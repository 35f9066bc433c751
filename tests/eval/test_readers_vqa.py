"""Captions, questions with short answers and ScienceQA, from files as they are published."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.eval.metrics.captions import STAND_IN
from owl2.eval.readers import MissingData
from owl2.eval.samples import Answer
from owl2.eval.tasks import find_tasks

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["coco", "flickr30k", "gqa", "okvqa", "science_qa", "textvqa", "vizwiz", "vqav2"]
SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."


def read(name, data=FIXTURES, prompt=None):
    [task] = find_tasks(name)
    if task.metric.name == "cider":
        pytest.importorskip("pycocoevalcap")
    source = task.source(data, prompt)
    return task.read(source), source


def by_id(name):
    (questions, _), _ = read(name)
    return {question.id: question for question in questions}


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


def test_they_are_all_in_the_suites():
    names = [task.name for suite in ("captions", "vqa") for task in find_tasks(None, suite)]
    assert sorted(names) == NAMES
    paper = [value for name in NAMES for value in find_tasks(name)[0].recipe.paper.values()]
    assert paper == [137.3, 85.1, 56.1, 57.7, 68.7, 54.3, 54.5, 79.4]


@pytest.mark.parametrize("name", NAMES)
def test_every_image_is_there_and_comes_first(name):
    (questions, _), source = read(name)
    assert questions
    assert len({question.id for question in questions}) == len(questions)
    for question in questions:
        [turn] = question.messages
        image, words = turn["content"]
        assert Image.open(image["path"]).size[0] > 1
        assert words["type"] == "text"
        assert question.text in words["text"]
    assert source.read and all(path.is_file() for path in source.read)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_expected_scores_all(name, monkeypatch):
    monkeypatch.setattr("owl2.eval.metrics.captions.TOKENISER", STAND_IN)
    [task] = find_tasks(name)
    (questions, _), _ = read(name)
    answers = [Answer(question, "", question.expected[0]) for question in questions]
    best = task.metric.score(answers)
    assert best.metrics[task.metric.main] > 0.9
    assert all(0 <= score <= 1 for score in best.each)
    wrong = task.metric.score([Answer(question, "", "zebra") for question in questions])
    assert wrong.metrics[task.metric.main] == 0
    assert set(task.recipe.paper) <= set(best.metrics)


def test_captions():
    (questions, broken), source = read("coco")
    assert [question.id for question in questions] == ["1101", "1102"]
    assert questions[0].messages[0]["content"][1]["text"] == CAPTION
    assert questions[0].expected[1] == "Nothing but a red wall."
    assert len(questions[1].expected) == 5
    [missing] = broken
    assert missing.id == "1199"
    assert missing.reason == "the image val2014/COCO_val2014_000000001199.jpg is not there"
    assert source.read == [FIXTURES / "coco" / "dataset_coco.json"]
    (questions, broken), _ = read("flickr30k")
    assert [question.id for question in questions] == ["2201.jpg", "2203.jpg"]
    assert [item.id for item in broken] == ["2204.jpg"]
    # "short" leaves nothing but the question, and that is the request.
    (questions, _), _ = read("coco", prompt="short")
    assert questions[0].messages[0]["content"][1]["text"] == CAPTION
    (questions, _), _ = read("coco", prompt="What is it?")
    assert questions[0].text == "What is it?"


def test_vqav2():
    (questions, broken), source = read("vqav2")
    assert [question.id for question in questions] == ["1101000", "1101001", "1102000"]
    assert [question.kind for question in questions] == ["yes/no", "number", "other"]
    walls = questions[1]
    assert walls.text == "How many walls are there?"
    assert walls.messages[0]["content"][1]["text"] == walls.text + SHORT
    assert walls.expected == (*["1"] * 6, "2", "2", "0", "3")
    assert [item.id for item in broken] == ["1199000"]
    assert len(source.read) == 2


def test_okvqa():
    question = by_id("okvqa")["11020"]
    assert question.kind == "Science and Technology"
    assert question.expected[:4] == ("scattering", "scattering", "scatter", "scatter")
    assert len(question.expected) == 10


def test_gqa():
    questions = by_id("gqa")
    assert [question.kind for question in questions.values()] == ["open", "binary", "binary"]
    assert questions["20003"].expected == ("t-shirt",)
    [task] = find_tasks("gqa")
    said = {"T-shirt.": 1.0, "tshirt": 0.0, "the t-shirt": 0.0}
    for text, score in said.items():
        assert task.metric.score([Answer(questions["20003"], "", text)]).each == [score]


def test_vizwiz():
    questions = by_id("vizwiz")
    assert [question.kind for question in questions.values()] == ["other", "unanswerable"]
    assert questions["VizWiz_val_00000001.jpg"].expected.count("grey") == 6


def test_textvqa():
    (questions, broken), _ = read("textvqa")
    assert [question.id for question in questions] == ["34602", "34603"]
    assert questions[0].messages[0]["content"][1]["text"] == "what does the sign say?" + SHORT
    assert [item.id for item in broken] == ["34604"]


def test_science_qa():
    (questions, broken), _ = read("science_qa")
    hot, sea = questions
    assert (hot.id, hot.kind, hot.expected) == ("11", "natural science", ("B",))
    assert hot.messages[0]["content"][1]["text"] == (
        "Context: The image shows lava.\nWhich of these is hotter?\nA. ice\nB. lava\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert hot.text == "Which of these is hotter?"
    assert sea.messages[0]["content"][1]["text"].startswith("Which sea is shown?\nA. the North")
    assert sea.facts["options"][3] == "the Black Sea"
    assert [item.id for item in broken] == ["14"], "12 has no image and is not of IMG"


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_say_where_to_get_them(name, tmp_path):
    with pytest.raises(MissingData) as caught:
        read(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert "https://" in message
    assert "licence: " in message


@pytest.mark.parametrize(("name", "count"), [("coco", 2), ("vqav2", 3)])
def test_images_beside_the_file_will_do(copy, name, count):
    data = copy("coco/dataset_coco.json", lambda content: None)
    for image in (data / "val2014").iterdir():
        image.rename(data / name / image.name)
    (questions, _), _ = read(name, data)
    assert len(questions) == count


def test_without_the_package_of_cider_nothing_is_asked(monkeypatch):
    monkeypatch.setattr("owl2.eval.metrics.captions.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pycocoevalcap"):
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
        ("vqav2", "v2_mscoco_val2014_annotations.json", _no_answers, "nobody's answer"),
        ("coco", "dataset_coco.json", _no_captions, "nobody's caption"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", _fewer, "no answer to question 1102000"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", _odd, "no answer to question 1102000"),
        ("science_qa", "problems.json", _no_such_choice, "answer 2 is none of the 2 choices"),
        ("science_qa", "pid_splits.json", _unknown, "'test' has it, problems.json does not"),
    ],
)
def test_broken_samples_are_named(copy, name, file, change, reason):
    (questions, broken), _ = read(name, copy(f"{name}/{file}", change))
    assert any(reason in item.reason for item in broken)
    assert questions, "and the others go on"


def _other_split(content):
    content["data_subtype"] = "train2014"


def _no_test(content):
    content["images"] = content["images"][1:2]


@pytest.mark.parametrize(
    ("name", "file", "change", "words"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", _other_split, "train2014"),
        ("okvqa", "OpenEnded_mscoco_val2014_questions.json", _other_split, "train2014"),
        ("coco", "dataset_coco.json", _no_test, "no image of the split 'test'"),
        ("gqa", "testdev_balanced_questions.json", lambda _: {"1": {}}, "'1': 'imageId'"),
        ("vizwiz", "val.json", lambda _: [{"image": 1}], "row 1: 'image' is 1"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda _: {"data": [{}]}, "data 1: 'image_id'"),
    ],
)
def test_files_that_are_not_as_published(copy, name, file, change, words):
    data = copy(f"{name}/{file}", change)
    with pytest.raises(InputError) as caught:
        read(name, data)
    assert words in str(caught.value)
    assert str(data / name) in str(caught.value)
