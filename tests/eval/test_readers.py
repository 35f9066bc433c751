"""All benchmarks of the paper in their published formats: valid, invalid and missing files."""

import csv
import json
import shutil

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.eval.listing import missing_data
from owl2.eval.tasks import find_tasks
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.eval.reading import FIXTURES, images, prompt_text, read, score

COUNTS = {  # valid samples, invalid ones, images per sample (None: one or more)
    "coco": (2, 1, 1),
    "flickr30k": (2, 1, 1),
    "vqav2": (3, 1, 1),
    "okvqa": (2, 0, 1),
    "gqa": (3, 1, 1),
    "vizwiz": (2, 1, 1),
    "textvqa": (2, 1, 1),
    "science_qa": (2, 1, 1),
    "mme": (28, 0, 1),
    "mmbench": (6, 0, 1),
    "mm_vet": (3, 0, 1),
    "seed_bench": (4, 0, None),
    "q_bench": (3, 0, 1),
    "pope_random": (6, 0, 1),
    "pope_popular": (6, 0, 1),
    "pope_adversarial": (6, 0, 1),
    "mmhal": (3, 0, 1),
    "mmlu": (2, 1, 0),
    "bbh": (3, 0, 0),
    "agieval": (5, 0, 0),
    "arc_c": (2, 1, 0),
    "arc_e": (1, 0, 0),
    "boolq": (2, 1, 0),
    "triviaqa": (2, 1, 0),
    "xsum": (1, 1, 0),
    "hellaswag": (2, 1, 0),
    "msrvtt_qa": (3, 0, 8),
    "msvd_qa": (2, 0, 8),
    "tgif_qa": (3, 0, 8),
}
BY_LM_EVAL = ("mmlu", "bbh", "agieval", "arc_c", "arc_e", "boolq", "triviaqa", "hellaswag")
JUDGED = ("mm_vet", "mmhal")

pytest.importorskip("pycocoevalcap")


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixture of a benchmark, in the directory for --data."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        if not (tmp_path / "val2014").exists():
            shutil.copytree(FIXTURES / "val2014", tmp_path / "val2014")
        return tmp_path

    return make


@pytest.mark.parametrize("name", COUNTS)
def test_samples_of_the_fixture(name):
    valid, invalid, num_images = COUNTS[name]
    [task] = find_tasks(name)
    data = task.data(FIXTURES)
    samples, others = task.read(data)
    assert (len(samples), len(others)) == (valid, invalid)
    for sample in samples:
        shown = images(sample)
        assert len(shown) == num_images or (num_images is None and shown)
        assert all(min(load_image(image).size) > 1 for image in shown)
        types = [part["type"] for part in sample.messages[0]["content"]]
        assert types == ["image"] * len(shown) + ["text"]
        assert sample.question
        assert sample.question in prompt_text(sample)
        json.dumps(dict(sample.metadata))
    assert data.files and all(path.is_file() for path in data.files)
    assert len(data.files) == len(set(data.files))


@pytest.mark.parametrize("name", [name for name in COUNTS if name not in (*JUDGED, *BY_LM_EVAL)])
def test_expected_answers_have_the_best_score(name):
    [task] = find_tasks(name)
    best = score(name, lambda sample: sample.expected[0])
    worst = score(name, lambda sample: "zebra")
    if name in ("coco", "flickr30k"):  # several references
        assert best["CIDEr"] > 90
    else:
        assert best[task.metric.main] == pytest.approx(2000 if name == "mme" else 1, abs=0.1)
    assert worst[task.metric.main] < best[task.metric.main]
    assert task.config.paper.keys() <= best.keys()


@pytest.mark.parametrize("name", JUDGED)
def test_judged_benchmarks_have_no_expected_answers(name):
    [task] = find_tasks(name)
    assert task.config.judge
    assert score(name, lambda sample: "A") == {"judged": 0.0}
    assert all(sample.expected == () for sample in read(name)[0])
    assert task.metric.main == "score" in task.config.paper


@pytest.mark.parametrize("name", COUNTS)
def test_missing_files_are_named_with_their_origin(name, tmp_path):
    [task] = find_tasks(name)
    files = task.config.data
    needles = (tmp_path / name, files.origin.strip(), files.license)
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, *needles):
        task.read(task.data(tmp_path))


@pytest.mark.parametrize("name", COUNTS)
def test_listed_files_are_those_that_are_read(name, copy, tmp_path):
    [task] = find_tasks(name)
    assert not missing_data(task, FIXTURES)
    assert missing_data(task, tmp_path)
    for path in task.data(FIXTURES).directories[0].iterdir():
        if name == "mme" or path.is_file():
            data = copy(name)
            lost = data / name / path.name
            shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
            assert missing_data(task, data)
            with raises_input_error(ErrorCode.FILE_NOT_FOUND):
                read(name, data)
            shutil.rmtree(data / name)


@pytest.mark.parametrize(
    ("name", "file", "left", "reason"),
    [
        ("mme", "mme/OCR/6610.jpg", 26, "OCR/6610.jpg"),
        ("mme", "mme/posters/images/tt6605.jpg", 26, "posters/images/tt6605.jpg"),
        ("mm_vet", "mm_vet/images/v1_1.jpg", 2, "v1_1.jpg"),
        ("seed_bench", "seed_bench/SEED-Bench-image/1454426_2591111986", 3, "1454426"),
        ("seed_bench", "seed_bench/SEED-Bench-video/770", 3, "770"),
        ("q_bench", "q_bench/images/00002.jpg", 1, "images/00002.jpg"),
        ("pope_random", "val2014/COCO_val2014_000000001101.jpg", 3, "000000001101.jpg"),
        ("mmhal", "mmhal/images/662_o.jpg", 2, "662_o.jpg"),
        ("msrvtt_qa", "msrvtt_qa/frames/video7011", 2, "video7011"),
        ("msvd_qa", "msvd_qa/YouTubeClips", 1, "vid1452"),
        ("tgif_qa", "tgif_qa/gifs/tumblr_made1.gif", 1, "tumblr_made1"),
    ],
)
def test_samples_with_missing_images_are_reported_and_skipped(name, file, left, reason, copy):
    data = copy(name)
    path = data / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    samples, invalid = read(name, data)
    assert len(samples) == left
    assert len(invalid) == COUNTS[name][0] - left > 0
    assert all(reason in item.reason for item in invalid)


# ------------------------------------------------------------------ damaged files

# (benchmark, file, key of the rows); "lines": JSONL; "entries": an object of rows.
FILES = [
    ("coco", "dataset_coco.json", "images"),
    ("flickr30k", "dataset_flickr30k.json", "images"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
    ("okvqa", "OpenEnded_mscoco_val2014_questions.json", "questions"),
    ("gqa", "testdev_balanced_questions.json", "entries"),
    ("vizwiz", "val.json", "list"),
    ("textvqa", "TextVQA_0.5.1_val.json", "data"),
    ("science_qa", "problems.json", "entries"),
    ("mm_vet", "mm-vet.json", "entries"),
    ("seed_bench", "SEED-Bench.json", "questions"),
    ("q_bench", "llvisionqa_dev.json", "list"),
    ("pope_random", "coco_pope_random.json", "lines"),
    ("mmhal", "response_template.json", "list"),
    ("bbh", "bbh/word_sorting.json", "examples"),
    ("agieval", "v1/*.jsonl", "lines"),
    ("arc_c", "ARC-Challenge-Test.jsonl", "lines"),
    ("arc_e", "ARC-Easy-Test.jsonl", "lines"),
    ("boolq", "*.jsonl", "lines"),
    ("triviaqa", "qa/wikipedia-dev.json", "Data"),
    ("hellaswag", "hellaswag_val.jsonl", "lines"),
    ("xsum", "*.jsonl", "lines"),
    ("msrvtt_qa", "test_qa.json", "list"),
    ("msvd_qa", "test_qa.json", "list"),
]


def damaged(row):
    """A row with wrong types, except for the keys of the split and the id."""
    kept = ("split", "image", "question_id", "pid")
    return {key: value if key in kept else {"odd": [value]} for key, value in row.items()}


def damage(path, where):
    """Insert a damaged copy of a row as the first row; replace the first of entries."""
    if where == "lines":
        text = path.read_text(encoding="utf-8")
        first = text.partition("\n")[0]
        path.write_text(f"{first[: len(first) // 2]}\n{text}", encoding="utf-8")
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if where == "entries":
        key = next(key for key, row in content.items() if row.get("image", True))
        content[key] = damaged(content[key])
    else:
        rows = content if where == "list" else content[where]
        rows.insert(0, damaged(next(row for row in rows if row.get("split") != "train")))
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(("name", "file", "where"), FILES)
def test_damaged_row_is_reported_and_skipped(copy, name, file, where):
    data = copy(name)
    path = min((data / name).glob(file))
    damage(path, where)
    samples, invalid = read(name, data)
    assert len(samples) == COUNTS[name][0] - (where == "entries")
    assert len(invalid) == COUNTS[name][1] + 1
    assert any(path.name in item.reason for item in invalid)


def test_row_of_mmlu_with_missing_columns_is_invalid(copy):
    data = copy("mmlu")
    path = data / "mmlu/test/anatomy_test.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0][:3], [*rows[1], "more"], rows[0]])
    samples, invalid = read("mmlu", data)
    assert len(samples) == COUNTS["mmlu"][0]
    assert ["row 1" in item.reason for item in invalid] == [True, False]
    assert "row 2" in invalid[1].reason


def change(path, function):
    """Change the JSON content of a file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    function(content)
    path.write_text(json.dumps(content), encoding="utf-8")


ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    ("name", "file", "function", "reason"),
    [
        (
            "vqav2",
            ANNOTATIONS,
            lambda content: content["annotations"][0].update(answers=[{"answer": " "}]),
            "answers are empty",
        ),
        (
            "coco",
            "dataset_coco.json",
            lambda content: content["images"][0].update(sentences=[]),
            "answers are empty",
        ),
        ("vqav2", ANNOTATIONS, lambda content: content["annotations"].pop(2), "1102000"),
        (
            "vqav2",
            ANNOTATIONS,
            lambda content: content["annotations"][2].update(question_id=[1]),
            "1102000",
        ),
        ("science_qa", "problems.json", lambda content: content["11"].update(answer=2), "'2'"),
        ("q_bench", "llvisionqa_dev.json", lambda rows: rows[0].update(correct_ans="so"), "'so'"),
        ("seed_bench", "SEED-Bench.json", lambda c: c["questions"][0].update(answer="E"), "'E'"),
        (
            "seed_bench",
            "SEED-Bench.json",
            lambda content: [row.update(segment=["a"]) for row in content["questions"]],
            "['a']",
        ),
    ],
)
def test_invalid_value_is_reported_and_other_samples_are_read(copy, name, file, function, reason):
    data = copy(name)
    change(data / name / file, function)
    samples, invalid = read(name, data)
    assert any(reason in item.reason for item in invalid)
    assert samples


@pytest.mark.parametrize(
    ("name", "file", "function"),
    [
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda rows: [row.pop("types") for row in rows.values()],
        ),
        (
            "okvqa",
            "mscoco_val2014_annotations.json",
            lambda content: [row.pop("question_type") for row in content["annotations"]],
        ),
        ("q_bench", "llvisionqa_dev.json", lambda rows: [row.update(type=9) for row in rows]),
    ],
)
def test_rows_may_have_no_known_category(copy, name, file, function):
    data = copy(name)
    change(data / name / file, function)
    samples, invalid = read(name, data)
    assert (len(samples), len(invalid)) == COUNTS[name][:2]
    assert {sample.category for sample in samples} <= {"", "9"}


def test_label_of_pope_that_is_not_yes_or_no_is_invalid(copy):
    data = copy("pope_random")
    path = data / "pope_random/coco_pope_random.json"
    path.write_text(path.read_text().replace('"label": "no"', '"label": "maybe"', 1))
    [invalid] = read("pope_random", data)[1]
    assert (invalid.id, "'maybe'" in invalid.reason) == ("2", True)


@pytest.mark.parametrize(
    ("name", "file", "text", "needle"),
    [
        ("vqav2", ANNOTATIONS, '{"data_subtype": "train2014"}', "train2014"),
        (
            "okvqa",
            "OpenEnded_mscoco_val2014_questions.json",
            '{"data_subtype": "train2014"}',
            "train2014",
        ),
        ("coco", "dataset_coco.json", '{"images": [{"split": "train"}]}', "'test'"),
        ("gqa", "testdev_balanced_questions.json", '{"1": {}}', "'1': "),
        ("vizwiz", "val.json", '[{"image": {}}]', "row 1: "),
        ("textvqa", "TextVQA_0.5.1_val.json", '{"data": [{}]}', "data 1: 'question_id'"),
        ("q_bench", "llvisionqa_dev.json", '[{"candidates": [], "question": "?"}]', "row 1: "),
        ("msvd_qa", "youtube_mapping.txt", "one two three\n", "'one two three'"),
        ("tgif_qa", "Test_frameqa_question.csv", "a,b\n1,2\n", "row 1: "),
        ("msrvtt_qa", "test_qa.json", '[{"id": 1}]', "row 1: 'question'"),
        ("arc_c", "ARC-Challenge-Test.jsonl", '{"id": "x", "question": 3}\n', "line 1: "),
        ("bbh", "bbh/word_sorting.json", "[]", "word_sorting.json"),
        ("triviaqa", "qa/wikipedia-dev.json", '{"Data": [{"Question": "?"}]}', "Data 1"),
        ("hellaswag", "hellaswag_val.jsonl", "{\n", "line 1: not valid JSON"),
    ],
)
def test_file_with_another_format_is_an_error(copy, name, file, text, needle):
    data = copy(name)
    (data / name / file).write_text(text)
    with pytest.raises(InputError) as caught:
        read(name, data)
    assert needle in str(caught.value)
    assert str(data / name) in str(caught.value)


def test_file_that_is_not_utf8_is_unreadable(copy, tmp_path):
    data = copy("mmlu")
    (data / "mmlu/test/anatomy_test.csv").write_bytes(b"What\xff?,a,b,c,d,A\n")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "anatomy_test.csv"):
        read("mmlu", data)
    shutil.copytree(FIXTURES / "xsum_files", tmp_path / "xsum")
    (tmp_path / "xsum/bbc-summary-data/102.summary").write_bytes(b"[SN]RESTBODY[SN]\xff")
    [invalid] = [item for item in read("xsum", tmp_path)[1] if item.id == "102"]
    assert "102.summary" in invalid.reason


def test_rows_of_a_jsonl_file(tmp_path):
    path = tmp_path / "val.jsonl"
    row = b'{"question": "?", "passage": "p", "label": true}'
    path.write_bytes(b"\xef\xbb\xbf" + row + b'\n\n{"kin\n\xff\n[]\n{"question": 1}\n' + row)
    samples, invalid = read("boolq", tmp_path)
    assert [sample.expected for sample in samples] == [("yes",)] * 2
    assert [item.id for item in invalid][:3] == ["line 3", "line 4", "line 5"]
    assert "line 6" in invalid[3].reason
    path.write_text('{"kin\n[]\n')
    with raises_input_error(ErrorCode.INVALID_FORMAT, "line 1: not valid JSON"):
        read("boolq", tmp_path)
