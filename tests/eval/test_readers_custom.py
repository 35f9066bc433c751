"""A user's own questions from a JSONL file."""

import json

import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.eval.metrics.captions import STAND_IN
from owl2.eval.readers.custom import own_task
from owl2.eval.samples import Answer


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (9, 7), "red").save(tmp_path / "red.png")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (9, 7), "blue").save(tmp_path / "more" / "blue.png")

    def lines(*rows):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return lines


def read(path, data=None):
    task = own_task(path)
    source = task.source(data)
    questions, broken = task.read(source)
    assert source.read == [path]
    return task, questions, broken


def words(question):
    return question.messages[0]["content"][-1]["text"]


def scores(task, questions, *texts):
    answers = [Answer(asked, "", text) for asked, text in zip(questions, texts, strict=True)]
    return task.metric.score(answers).each


def test_exact(write, tmp_path):
    task, questions, broken = read(
        write(
            {"image": "red.png", "question": "Colour?", "answers": ["red", "Crimson"]},
            {"id": 7, "kind": "sum", "question": "1 + 1?", "answer": "2"},
            {"image": ["red.png", "more/blue.png"], "question": "Same?", "answer": "no"},
        )
    )
    assert (task.name, task.metric.name, broken) == ("mine", "exact_match", [])
    assert (task.recipe.max_new_tokens, task.recipe.scale) == (16, 100)
    assert [question.id for question in questions] == ["1", "7", "3"]
    assert [question.kind for question in questions] == ["", "sum", ""]
    assert words(questions[0]) == "Colour?\nAnswer the question using a single word or phrase."
    parts = [[part["type"] for part in asked.messages[0]["content"]] for asked in questions]
    assert parts == [["image", "text"], ["text"], ["image", "image", "text"]]
    assert questions[0].messages[0]["content"][0]["path"] == str(tmp_path / "red.png")
    assert scores(task, questions, "crimson.", "2", "yes") == [1, 1, 0]


def test_vqa(write):
    row = {"question": "Colour?", "metric": "vqa", "answers": ["red", "red", "pink", "lime"]}
    short = {"question": "Shape?", "answers": ["round"] * 3}
    task, questions, [broken] = read(write(row, short))
    assert scores(task, questions, "The red") == pytest.approx(
        [(2 / 3 + 2 / 3 + 1 / 3 + 1 / 3) / 4]
    )
    assert broken.id == "2"
    assert "mine.jsonl, line 2: VQA accuracy compares with the answers of 4" in broken.reason


def test_choice(write):
    task, questions, broken = read(
        write(
            {"question": "Which?", "options": ["a dog", "a cat"], "answer": "a cat"},
            {"question": "Who?", "options": ["me", "you", "B"], "answers": ["B"]},
            {"question": "When?", "options": ["now", "then"], "answers": ["A"]},
            {"question": "Why?", "options": ["so", "no"], "answer": "C"},
            {"question": "How?", "options": ["so", "no"], "answers": ["A", "B"]},
            {"question": "What?", "options": ["so"], "answer": "A"},
        )
    )
    assert task.metric.name == "letter"
    assert [question.expected for question in questions] == [("B",), ("C",), ("A",)]
    assert words(questions[0]) == (
        "Which?\nA. a dog\nB. a cat\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert scores(task, questions, "B. a cat", "A", "now") == [1, 0, 1]
    assert [item.id for item in broken] == ["4", "5", "6"]


def test_cider(write, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr("owl2.eval.metrics.captions.TOKENISER", STAND_IN)
    task, questions, broken = read(
        write(
            {"image": "red.png", "answers": ["a plain red wall"], "metric": "cider"},
            {"image": "more/blue.png", "question": "Caption?", "answers": ["the deep blue sea"]},
            {"image": "red.png", "answers": ["..."]},
        )
    )
    assert [words(asked) for asked in questions] == [
        "Provide a one-sentence caption for the provided image.",
        "Caption?",
    ]
    assert (task.recipe.max_new_tokens, task.recipe.scale) == (64, 1)
    assert scores(task, questions, "A plain red wall.", "a cat") == pytest.approx([1, 0])
    assert ["no answer has words" in item.reason for item in broken] == [True]


def test_cider_without_its_package(write, monkeypatch):
    monkeypatch.setattr("owl2.eval.metrics.captions.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pycocoevalcap"):
        read(write({"answer": "a wall", "metric": "cider"}))


def test_images_may_be_in_the_data_folder(write, tmp_path):
    path = write({"image": "blue.png", "question": "Colour?", "answer": "blue"})
    _, questions, _ = read(path, tmp_path / "more")
    assert questions[0].messages[0]["content"][0]["path"] == str(tmp_path / "more" / "blue.png")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "green.png", "question": "?", "answer": "a"}, "green.png is not there"),
        ({"image": "", "question": "?", "answer": "a"}, "is not there"),
        ({"image": 7, "question": "?", "answer": "a"}, "'image' is 7, not a text"),
        ({"question": "?"}, "'answer', a text, is missing"),
        ({"question": "?", "answers": [" "]}, "no answer is given"),
        ({"question": "?", "answers": "a"}, "'answers' is 'a', not a list of texts"),
        ({"question": " ", "answer": "a"}, "the question is blank"),
        ({"answer": "a"}, "'question', a text, is missing"),
        ({"question": "?", "answer": "a", "metric": "vqa"}, "metric of the file is 'exact'"),
        ({"question": "?", "options": ["a", "b"], "answer": "a"}, "options are of a choice"),
        ({"image": "red.png", "question": "?", "answer": "a"}, "line 2). There are: answer, "),
        ({"id": "1", "question": "?", "answer": "a"}, "same id"),
    ],
)
def test_a_broken_line_is_named_and_the_others_go_on(write, row, words):
    good = {"question": "fine?", "answer": "yes"}
    _, questions, [broken] = read(write(good, row, good))
    assert [question.id for question in questions] == ["1", "3"]
    assert words in broken.reason
    assert broken.id in ("2", "1")


BROKEN_LINES = [
    (b"{", "line 1: not JSON"),
    (b'{"question": "Which?", "ans', "line 1: not JSON"),
    (b"\xff\xfe", "line 1: not JSON: 'utf-8' codec"),
    (b"[" * 100_000, "line 1: not JSON"),
    (b"[]", "line 1 is []"),
    (b'{"images": []}', "Do you mean 'image'?"),
]


@pytest.mark.parametrize(("line", "words"), BROKEN_LINES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_is_none_is_named_and_the_others_go_on(tmp_path, line, words, place):
    lines = [b'{"question": "fine?", "answer": "yes"}'] * 2
    lines.insert(place, line)
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join(lines))
    _, questions, [broken] = read(tmp_path / "mine.jsonl")
    assert broken.id == str(place + 1)
    assert words.replace("line 1", f"line {place + 1}") in broken.reason
    assert {question.id for question in questions} == {"1", "2", "3"} - {broken.id}


def test_the_first_line_that_can_be_read_names_the_metric(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{\n{"question": "Which?", "options": ["a", "b"], "answer": "a"}\n')
    task, questions, broken = read(path)
    assert (task.metric.name, len(questions), len(broken)) == ("letter", 1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "holds no questions"),
        (b"\n \n", "holds no questions"),
        (b'{"metric": "cidr"}\n', "Do you mean 'cider'?"),
        (b'{"metric": ["vqa"]}\n', "There are: choice, cider, exact, vqa"),
        # Without it the others would be scored by another metric.
        (b'{"metrics": "vqa"}\n{"question": "Why?", "answer": "a"}\n', "Do you mean 'metric'?"),
        *BROKEN_LINES,
    ],
)
def test_a_file_that_is_none(tmp_path, text, words):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        own_task(path)
    assert words in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        own_task(tmp_path / "none.jsonl")
