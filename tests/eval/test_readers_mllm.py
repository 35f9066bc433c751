"""MLLM, hallucination and video benchmarks in their published formats."""

import json
import shutil
import sys

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.eval.listing import missing_data
from owl2.eval.tasks import find_tasks
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.eval.reading import FIXTURES, LETTER, SHORT, by_id, images, prompt_text, read, score

COUNTS = {  # samples, images per sample
    "mme": (28, 1),
    "mmbench": (6, 1),
    "mm_vet": (3, 1),
    "seed_bench": (4, None),
    "q_bench": (3, 1),
    "pope_random": (6, 1),
    "pope_popular": (6, 1),
    "pope_adversarial": (6, 1),
    "mmhal": (3, 1),
    "msrvtt_qa": (3, 8),
    "msvd_qa": (2, 8),
    "tgif_qa": (3, 8),
}
JUDGED = ("mm_vet", "mmhal")


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixture of a benchmark, in the directory for --data."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        if name.startswith("pope"):
            shutil.copytree(FIXTURES / "val2014", tmp_path / "val2014")
        return tmp_path

    return make


def change(path, function):
    path.write_text(json.dumps(function(json.loads(path.read_text()))))


# ------------------------------------------------------------------ all benchmarks


def test_suites_contain_all_benchmarks_with_the_results_of_the_paper():
    suites = ("mllm", "hallucination", "video")
    assert [t.name for suite in suites for t in find_tasks(None, suite)] == list(COUNTS)
    metrics = [v for name in COUNTS for v in find_tasks(name)[0].config.paper.values()]
    mllm, hallucination = [1450.19, 64.5, 36.2, 57.8, 62.9], [87.85, 85.60, 83.80, 2.17, 0.56]
    assert metrics == [*mllm, *hallucination, 23.6, 42.4, 61.6]


@pytest.mark.parametrize("name", COUNTS)
def test_all_rows_of_the_fixture_are_valid_and_all_images_open(name):
    samples, invalid = read(name)
    assert invalid == []
    assert len(samples) == COUNTS[name][0]
    for sample in samples:
        shown = images(sample)
        assert len(shown) == (COUNTS[name][1] or len(shown)) > 0
        assert all(load_image(image).size for image in shown)
        assert [part["type"] for part in sample.messages[0]["content"]].index("text") == len(shown)
        assert sample.question
        assert sample.question in prompt_text(sample)
        json.dumps(dict(sample.metadata))


@pytest.mark.parametrize("name", [name for name in COUNTS if name not in JUDGED])
def test_expected_answers_have_the_best_score(name):
    [task] = find_tasks(name)
    best = score(name, lambda sample: sample.expected[0])
    assert best[task.metric.main] == (2000 if name == "mme" else 1)
    assert score(name, lambda sample: "??")[task.metric.main] < best[task.metric.main]


@pytest.mark.parametrize("name", COUNTS)
def test_metric_has_the_results_of_the_paper(name):
    [task] = find_tasks(name)
    metrics = score(name, lambda sample: "A")
    if name in JUDGED:
        assert metrics == {"judged": 0.0} and task.config.judge
        assert all(sample.expected == () for sample in read(name)[0])
        assert task.metric.main == "score" in task.config.paper
    else:
        assert task.metric.main in task.config.paper
        assert task.config.paper.keys() <= metrics.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_listed_files_are_those_that_are_read(name, tmp_path):
    [task] = find_tasks(name)
    assert not missing_data(task, FIXTURES)
    assert missing_data(task, tmp_path)
    for path in task.data(FIXTURES).directories[0].iterdir():
        if name == "mme" or path.is_file():
            shutil.copytree(FIXTURES / name, tmp_path / name)
            gone = tmp_path / name / path.name
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
            assert missing_data(task, tmp_path)
            with raises_input_error(ErrorCode.FILE_NOT_FOUND):
                read(name, tmp_path)
            shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("name", COUNTS)
def test_missing_files_are_named_with_their_origin(name, tmp_path):
    [task] = find_tasks(name)
    files = task.config.data
    needles = (tmp_path / name, files.origin.strip(), files.license)
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, *needles):
        task.read(task.data(tmp_path))


@pytest.mark.parametrize(
    ("name", "gone", "left", "reason"),
    [
        ("mme", "mme/OCR/6610.jpg", 26, "6610.txt"),
        ("mme", "mme/posters/images/tt6605.jpg", 26, "tt6605.txt"),
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
def test_samples_with_missing_images_are_reported_and_skipped(name, gone, left, reason, copy):
    data = copy(name)
    path = data / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    samples, invalid = read(name, data)
    assert len(samples) == left
    assert len(invalid) == COUNTS[name][0] - left > 0
    assert all(reason in item.reason for item in invalid)


# ------------------------------------------------------------------ MME


def test_mme_has_the_prompt_of_the_task():
    samples = by_id("mme")
    sample = samples["posters/tt6605#2"]
    assert sample.question == "Is this a poster of a play?"
    assert prompt_text(sample) == sample.question + SHORT
    assert (sample.expected, sample.category) == (("No",), "posters")
    assert {sample.category for sample in samples.values()} == {
        sample.metadata["category"] for sample in samples.values()
    }


def test_mme_score_of_a_constant_yes():
    metrics = score("mme", lambda sample: "Yes")
    assert (metrics["perception"], metrics["cognition"]) == (500, 200)


def test_text_of_mme_with_another_format_is_invalid(copy):
    data = copy("mme")
    (data / "mme/OCR/6610.txt").write_text("Is it?\tYes\nIs it not?\tPerhaps\n")
    (data / "mme/count/notes.txt").write_bytes("caf\xe9\tYes".encode("latin-1"))
    samples, invalid = read("mme", data)
    assert len(samples) == 26
    assert {item.id for item in invalid} == {"OCR/6610", "count/notes"}
    reasons = " ".join(item.reason for item in invalid)
    assert "6610.txt, line 2: 'Is it not?\\tPerhaps'" in reasons and "notes.txt" in reasons


def test_fingerprint_of_mme_covers_all_texts(copy):
    data = copy("mme")
    shutil.copy(data / "mme/OCR/6610.txt", data / "mme/OCR/6620.txt")
    shutil.copy(data / "mme/OCR/6610.jpg", data / "mme/OCR/6620.jpg")
    [task] = find_tasks("mme")
    data_files = task.data(data)
    assert len(task.read(data_files)[0]) == 30
    assert len(data_files.files) == len(set(data_files.files)) == 15


# ------------------------------------------------------------------ other image benchmarks


def test_options_have_letters():
    seed = by_id("seed_bench")["101669"]
    assert prompt_text(seed) == (
        "How many squares are there?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER
    )
    assert (seed.expected, seed.category) == (("A",), "Instances Counting")
    quality = by_id("q_bench")["q_bench#2"]
    assert (quality.expected, quality.category) == (("C",), "what")
    assert prompt_text(quality).endswith("A. Noise\nB. Blur\nC. Blocks" + LETTER)


def test_seed_bench_has_videos():
    video = by_id("seed_bench")["3000"]
    assert len(images(video)) == 8 and video.metadata["media"] == "video"
    metrics = score("seed_bench", lambda q: "B" if q.metadata["media"] == "image" else "D")
    assert (metrics["accuracy_image"], metrics["accuracy_video"]) == (0.5, 0.5)


def test_answer_that_is_not_an_option_is_invalid(copy):
    data = copy("q_bench")
    path = data / "q_bench/llvisionqa_dev.json"
    change(path, lambda rows: [{**rows[0], "correct_ans": "Perhaps"}, *rows[1:]])
    [invalid] = read("q_bench", data)[1]
    assert invalid.id == "q_bench#1" and "'Perhaps'" in invalid.reason
    data = copy("seed_bench")
    path = data / "seed_bench/SEED-Bench.json"
    change(
        path, lambda file: file | {"questions": [{**q, "answer": "E"} for q in file["questions"]]}
    )
    assert len(read("seed_bench", data)[1]) == 4


def test_invalid_segment_of_a_video(copy):
    data = copy("seed_bench")
    path = data / "seed_bench/SEED-Bench.json"
    change(path, lambda f: f | {"questions": [{**q, "segment": ["a"]} for q in f["questions"]]})
    samples, invalid = read("seed_bench", data)
    assert (len(samples), len(invalid)) == (2, 2)  # images have no segment
    assert "['a']" in invalid[0].reason


def test_q_bench_test_split_without_answers_is_an_error(copy):
    data = copy("q_bench")
    path = data / "q_bench/llvisionqa_dev.json"
    change(path, lambda rows: [{k: v for k, v in r.items() if k != "correct_ans"} for r in rows])
    with pytest.raises(InputError) as error:
        read("q_bench", data)
    assert "llvisionqa_dev.json, row 1: 'correct_ans'" in str(error.value)


def test_splits_of_pope_may_share_a_directory(tmp_path):
    texts = {name: by_id(f"pope_{name}")["2"].question for name in ("random", "popular")}
    assert texts == {
        "random": "Is there a kite in the image?",
        "popular": "Is there a person in the image?",
    }
    shutil.copytree(FIXTURES / "val2014", tmp_path / "val2014")
    for name in texts:
        file = f"coco_pope_{name}.json"
        (tmp_path / "pope").mkdir(exist_ok=True)
        shutil.copy(FIXTURES / f"pope_{name}" / file, tmp_path / "pope" / file)
        assert by_id(f"pope_{name}", tmp_path)["2"].question == texts[name]


def test_pope_score_of_a_constant_yes():
    metrics = score("pope_adversarial", lambda sample: "Yes, there is.")
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert (metrics["accuracy"], metrics["recall"], metrics["yes_ratio"]) == (0.5, 1, 1)


def test_label_of_pope_that_is_not_yes_or_no_is_invalid(copy):
    data = copy("pope_random")
    path = data / "pope_random/coco_pope_random.json"
    path.write_text(path.read_text().replace('"label": "no"', '"label": "maybe"', 1))
    [invalid] = read("pope_random", data)[1]
    assert (invalid.id, "'maybe'" in invalid.reason) == ("2", True)


def test_metadata_for_the_judge():
    vet = by_id("mm_vet")["v1_1"]
    assert vet.metadata["reference"] == "square <AND> left<OR>a square is on the left"
    assert vet.metadata["capabilities"] == ["rec", "spat"]
    hal = by_id("mmhal")["mmhal#1"]
    assert hal.metadata == {"reference": "The square is white.", "content": "Square, Table"}
    assert (hal.category, prompt_text(hal)) == ("attribute", hal.question)


# ------------------------------------------------------------------ videos


def test_videos_are_found_as_folders_and_files():
    assert {path.parent.name for path in images(by_id("msrvtt_qa")["158581"])} == {"video7010"}
    folders = [images(sample)[0].parent for sample in by_id("msvd_qa").values()]
    assert [folder.name for folder in folders] == ["vid1451", "made0_00002_0_9"]
    first, *_, last = images(by_id("tgif_qa")["tgif_qa#3"])
    assert str(first).endswith("tumblr_made2.gif, frame 1 of 8")
    left, right = (load_image(frame).convert("L") for frame in (first, last))
    assert left.getpixel((1, 4)) > 200 > right.getpixel((1, 4))  # the square moves to the right


def test_video_file_without_a_folder_needs_av(copy, monkeypatch):
    data = copy("msrvtt_qa")
    shutil.rmtree(data / "msrvtt_qa/frames/video7011")
    (data / "msrvtt_qa/TestVideo").mkdir()
    (data / "msrvtt_qa/TestVideo/video7011.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "video7011.mp4", "av"):
        read("msrvtt_qa", data)


def test_categories_of_video_questions():
    assert [q.category for q in by_id("msrvtt_qa").values()] == ["what", "how", "who"]
    assert [q.category for q in by_id("tgif_qa").values()] == ["object", "number", "color"]


def test_video_prompt():
    assert prompt_text(by_id("msvd_qa")["37001"]) == "who is drawing a square?" + SHORT


@pytest.mark.parametrize(
    ("name", "file", "text", "needle"),
    [
        ("msvd_qa", "youtube_mapping.txt", "one two three\n", "'one two three'"),
        ("tgif_qa", "Test_frameqa_question.csv", "a,b\n1,2\n", "gif_name"),
        ("msrvtt_qa", "test_qa.json", '[{"id": 1}]', "row 1: 'question'"),
    ],
)
def test_file_of_a_video_benchmark_with_another_format(name, file, text, needle, copy):
    data = copy(name)
    (data / name / file).write_text(text)
    with pytest.raises(InputError) as error:
        read(name, data)
    assert needle in str(error.value)
