"""Custom samples of the user in a JSONL file."""

import json

import pytest
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics.captions import FALLBACK
from owl2.eval.samples import Response
from owl2.eval.tasks import find_tasks
from tests.errors import raises_input_error
from tests.eval.reading import LETTER, prompt_text


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
    [task] = find_tasks(str(path))
    files = task.data(data)
    samples, invalid = task.read(files)
    assert files.files == [path]
    return task, samples, invalid


def scores(task, samples, *texts):
    pairs = zip(samples, texts, strict=True)
    return task.metric.score([Response(sample, "", text) for sample, text in pairs]).per_sample


def test_exact(write, tmp_path):
    task, samples, invalid = read(
        write(
            {"image": "red.png", "question": "Color?", "answers": ["red", "Crimson"]},
            {"id": 7, "category": "sum", "question": "1 + 1?", "answer": "2"},
            {"image": ["red.png", "more/blue.png"], "question": "Same?", "answer": "no"},
        )
    )
    assert (task.name, task.metric.name, invalid) == ("mine", "exact_match", [])
    assert (task.config.max_new_tokens, task.config.scale) == (16, 100)
    assert [sample.id for sample in samples] == ["1", "7", "3"]
    assert [sample.category for sample in samples] == ["", "sum", ""]
    assert prompt_text(samples[0]) == "Color?"
    parts = [[part["type"] for part in sample.messages[0]["content"]] for sample in samples]
    assert parts == [["image", "text"], ["text"], ["image", "image", "text"]]
    assert samples[0].messages[0]["content"][0]["path"] == str(tmp_path / "red.png")
    assert scores(task, samples, "crimson.", "2", "yes") == [1, 1, 0]


def test_vqa(write):
    row = {"question": "Color?", "metric": "vqa", "answers": ["red", "red", "pink", "lime"]}
    short = {"question": "Shape?", "answers": ["round"] * 3}
    task, samples, [invalid] = read(write(row, short))
    assert scores(task, samples, "The red") == pytest.approx([(2 / 3 + 2 / 3 + 1 / 3 + 1 / 3) / 4])
    assert invalid.id == "2"
    assert "mine.jsonl, line 2: " in invalid.reason and "4" in invalid.reason


def test_choice(write):
    task, samples, invalid = read(
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
    assert [sample.expected for sample in samples] == [("B",), ("C",), ("A",)]
    assert prompt_text(samples[0]) == ("Which?\nA. a dog\nB. a cat" + LETTER)
    assert scores(task, samples, "B. a cat", "A", "now") == [1, 0, 1]
    assert [item.id for item in invalid] == ["4", "5", "6"]


@pytest.mark.parametrize(
    ("metric", "rank_options"), [("likelihood", "sum"), ("likelihood_norm", "mean")]
)
def test_ranked_options_are_not_part_of_the_prompt(write, metric, rank_options):
    row = {"question": "Which?", "options": ["a dog", "a cat"], "metric": metric}
    task, [sample], [invalid] = read(
        write({**row, "answer": "a cat"}, {"question": "Who?", "answer": "me"})
    )
    assert (task.metric.name, task.config.rank_options) == ("likelihood", rank_options)
    assert (sample.expected, sample.metadata["options"]) == (("a cat",), ["a dog", "a cat"])
    assert prompt_text(sample) == "Which?"
    assert scores(task, [sample] * 2, "a cat", "a dog") == [1, 0]
    assert "'options'" in invalid.reason


def test_yes_no(write):
    question = {"question": "is there a dog?", "metric": "yes_no"}
    task, samples, [invalid] = read(
        write(
            {**question, "answer": "yes"},
            {**question, "answer": "no"},
            question | {"answer": "maybe"},
        )
    )
    assert (task.metric.name, task.metric.main) == ("pope", "f1")
    assert scores(task, samples, "Yes.", "yes") == [1, 0]
    assert "maybe" in invalid.reason


def test_cider(write, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr("owl2.eval.metrics.captions.TOKENIZER", FALLBACK)
    task, samples, invalid = read(
        write(
            {"image": "red.png", "answers": ["a plain red wall"], "metric": "cider"},
            {"image": "more/blue.png", "question": "Caption?", "answers": ["the deep blue sea"]},
            {"image": "red.png", "answers": ["..."]},
        )
    )
    assert [prompt_text(sample) for sample in samples] == [
        "Provide a one-sentence caption for the provided image.",
        "Caption?",
    ]
    assert (task.config.max_new_tokens, task.config.scale) == (64, 1)
    assert scores(task, samples, "A plain red wall.", "a cat") == pytest.approx([1, 0])
    assert [item.id for item in invalid] == ["3"]


def test_cider_needs_its_package(write, monkeypatch):
    monkeypatch.setattr("owl2.errors.find_spec", lambda name: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "pycocoevalcap"):
        read(write({"answer": "a wall", "metric": "cider"}))


def test_images_may_be_in_the_data_directory(write, tmp_path):
    path = write({"image": "blue.png", "question": "Color?", "answer": "blue"})
    _, samples, _ = read(path, tmp_path / "more")
    assert samples[0].messages[0]["content"][0]["path"] == str(tmp_path / "more" / "blue.png")


@pytest.mark.parametrize(
    ("row", "needle"),
    [
        ({"image": "green.png", "question": "?", "answer": "a"}, "green.png"),
        ({"image": "", "question": "?", "answer": "a"}, "no name"),
        ({"image": 7, "question": "?", "answer": "a"}, "image is '7'"),
        ({"question": "?"}, "'answer'"),
        ({"question": "?", "answers": [" "]}, "empty"),
        ({"question": "?", "answers": "a"}, "'answers' is 'a'"),
        ({"question": " ", "answer": "a"}, "empty"),
        ({"answer": "a"}, "'question'"),
        ({"question": "?", "answer": "a", "metric": "vqa"}, "'exact'"),
        ({"question": "?", "options": ["a", "b"], "answer": "a"}, "'exact'"),
        ({"picture": "red.png", "question": "?", "answer": "a"}, "'picture'"),
        ({"id": "1", "question": "?", "answer": "a"}, "same id"),
    ],
)
def test_invalid_line_is_reported_and_skipped(write, row, needle):
    good = {"question": "fine?", "answer": "yes"}
    _, samples, [invalid] = read(write(good, row, good))
    assert [sample.id for sample in samples] == ["1", "3"]
    assert needle in invalid.reason
    assert invalid.id in ("2", "1")


INVALID_LINES = [
    (b"{", "line 1: not valid JSON"),
    (b'{"question": "Which?", "ans', "line 1: not valid JSON"),
    (b"\xff\xfe", "line 1: not valid JSON: 'utf-8' codec"),
    (b"[" * 100_000, "line 1: not valid JSON"),
    (b"[]", "line 1 is []"),
    (b'{"images": []}', "'image'"),
]


@pytest.mark.parametrize(("line", "needle"), INVALID_LINES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_line_that_is_not_an_object_is_reported_and_skipped(tmp_path, line, needle, place):
    lines = [b'{"question": "fine?", "answer": "yes"}'] * 2
    lines.insert(place, line)
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join(lines))
    _, samples, [invalid] = read(tmp_path / "mine.jsonl")
    assert invalid.id in (str(place + 1), f"line {place + 1}")
    assert needle.replace("line 1", f"line {place + 1}") in invalid.reason
    assert {sample.id for sample in samples} == {"1", "2", "3"} - {str(place + 1)}


def test_first_readable_line_selects_the_metric(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{\n{"question": "Which?", "options": ["a", "b"], "answer": "a"}\n')
    task, samples, invalid = read(path)
    assert (task.metric.name, len(samples), len(invalid)) == ("letter", 1, 1)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        (b"", "mine.jsonl"),
        (b"\n \n", "mine.jsonl"),
        (b'{"metric": "cidr"}\n', "'cider'"),
        (b'{"metric": ["vqa"]}\n', "choice, cider, exact, likelihood"),
        # If this line was skipped, another metric would score the rest.
        (b'{"metrics": "vqa"}\n{"question": "Why?", "answer": "a"}\n', "'metric'"),
        *INVALID_LINES,
    ],
)
def test_file_without_valid_lines_is_an_error(tmp_path, text, needle):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        find_tasks(str(path))
    assert needle in str(caught.value)


def test_missing_file_is_an_error(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "none.jsonl"):
        find_tasks(str(tmp_path / "none.jsonl"))
