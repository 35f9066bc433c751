"""MLLM, hallucination and video benchmarks, from files as they are published."""

import json
import shutil
import sys

import pytest

from owl2.errors import InputError
from owl2.eval.listing import data_state
from owl2.eval.readers import MissingData
from owl2.eval.tasks import find_tasks
from owl2.processing.image_io import load_image
from tests.eval.reading import FIXTURES, LETTER, SHORT, by_id, images, read, score, words

COUNTS = {  # questions, images of each
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
    """A copy of a benchmark's fixture, in the folder that has all data."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        if name.startswith("pope"):
            shutil.copytree(FIXTURES / "val2014", tmp_path / "val2014")
        return tmp_path

    return make


def change(path, function):
    path.write_text(json.dumps(function(json.loads(path.read_text()))))


# ------------------------------------------------------------------ all of them


def test_they_are_all_in_the_suites():
    suites = ("mllm", "hallucination", "video")
    assert [t.name for suite in suites for t in find_tasks(None, suite)] == list(COUNTS)
    figures = [v for name in COUNTS for v in find_tasks(name)[0].recipe.paper.values()]
    mllm, hallucination = [1450.19, 64.5, 36.2, 57.8, 62.9], [87.85, 85.60, 83.80, 2.17, 0.56]
    assert figures == [*mllm, *hallucination, 23.6, 42.4, 61.6]


@pytest.mark.parametrize("name", COUNTS)
def test_every_fixture_is_read_whole_and_its_images_open(name):
    questions, broken = read(name)
    assert broken == []
    assert len(questions) == COUNTS[name][0]
    for question in questions:
        shown = images(question)
        assert len(shown) == (COUNTS[name][1] or len(shown)) > 0
        assert all(load_image(image).size for image in shown)
        assert [part["type"] for part in question.messages[0]["content"]].index("text") == len(
            shown
        )
        assert question.text and question.text in words(question)
        json.dumps(dict(question.facts))


@pytest.mark.parametrize("name", [name for name in COUNTS if name not in JUDGED])
def test_the_expected_answers_are_the_best(name):
    [task] = find_tasks(name)
    best = score(name, lambda question: question.expected[0])
    assert best[task.metric.main] == (2000 if name == "mme" else 1)
    assert score(name, lambda question: "??")[task.metric.main] < best[task.metric.main]


@pytest.mark.parametrize("name", COUNTS)
def test_paper_figures_are_of_what_the_metric_gives(name):
    [task] = find_tasks(name)
    figures = score(name, lambda question: "A")
    if name in JUDGED:
        assert figures == {"judged": 0.0} and task.recipe.judge
        assert all(question.expected == () for question in read(name)[0])
        assert task.metric.main == "score" in task.recipe.paper
    else:
        assert task.metric.main in task.recipe.paper
        assert task.recipe.paper.keys() <= figures.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_the_files_that_are_told_are_those_that_are_read(name, tmp_path):
    [task] = find_tasks(name)
    assert data_state(task, FIXTURES).found
    assert not data_state(task, tmp_path).found
    for path in task.source(FIXTURES).folders[0].iterdir():
        if name == "mme" or path.is_file():
            shutil.copytree(FIXTURES / name, tmp_path / name)
            gone = tmp_path / name / path.name
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
            assert not data_state(task, tmp_path).found
            with pytest.raises(MissingData):
                read(name, tmp_path)
            shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("name", COUNTS)
def test_missing_data_is_named_with_its_origin(name, tmp_path):
    [task] = find_tasks(name)
    with pytest.raises(MissingData) as caught:
        task.read(task.source(tmp_path))
    assert str(tmp_path / name) in str(caught.value)
    assert task.recipe.data.origin.strip() in str(caught.value)
    assert task.recipe.data.licence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "gone", "left", "reason"),
    [
        ("mme", "mme/OCR/6610.jpg", 26, "6610.txt is not there"),
        ("mme", "mme/posters/images/tt6605.jpg", 26, "tt6605.txt is not there"),
        ("mm_vet", "mm_vet/images/v1_1.jpg", 2, "the image v1_1.jpg is not there"),
        ("seed_bench", "seed_bench/SEED-Bench-image/1454426_2591111986", 3, "the image 1454426"),
        ("seed_bench", "seed_bench/SEED-Bench-video/770", 3, "the video 770.webm is not there"),
        ("q_bench", "q_bench/images/00002.jpg", 1, "images/00002.jpg is not there"),
        ("pope_random", "val2014/COCO_val2014_000000001101.jpg", 3, "000000001101.jpg is not"),
        ("mmhal", "mmhal/images/662_o.jpg", 2, "https://c1.staticflickr.com/6/5555/662_o.jpg"),
        ("msrvtt_qa", "msrvtt_qa/frames/video7011", 2, "the video video7011 is not there"),
        ("msvd_qa", "msvd_qa/YouTubeClips", 1, "made0_00002_0_9 is not there"),
        ("tgif_qa", "tgif_qa/gifs/tumblr_made1.gif", 1, "tumblr_made1 is not there"),
    ],
)
def test_a_missing_image_is_named_and_the_others_are_asked(name, gone, left, reason, copy):
    data = copy(name)
    path = data / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    questions, broken = read(name, data)
    assert len(questions) == left
    assert len(broken) == COUNTS[name][0] - left > 0
    assert all(reason in item.reason for item in broken)


# ------------------------------------------------------------------ MME


def test_mme_asks_in_the_prompts_words():
    questions = by_id("mme")
    question = questions["posters/tt6605#2"]
    assert question.text == "Is this a poster of a play?"
    assert words(question) == question.text + SHORT
    assert (question.expected, question.kind) == (("No",), "posters")
    assert {question.kind for question in questions.values()} == {
        question.facts["category"] for question in questions.values()
    }


def test_mme_that_always_says_yes_gets_half_and_no_pair():
    figures = score("mme", lambda question: "Yes")
    assert (figures["perception"], figures["cognition"]) == (500, 200)


def test_a_text_of_mme_that_is_no_pair_of_questions_is_broken(copy):
    data = copy("mme")
    (data / "mme/OCR/6610.txt").write_text("Is it?\tYes\nIs it not?\tPerhaps\n")
    (data / "mme/count/notes.txt").write_bytes("caf\xe9\tYes".encode("latin-1"))
    questions, broken = read("mme", data)
    assert len(questions) == 26
    assert {item.id for item in broken} == {"OCR/6610", "count/notes"}
    reasons = " ".join(item.reason for item in broken)
    assert "6610.txt, line 2: 'Is it not?\\tPerhaps'" in reasons and "notes.txt" in reasons


def test_all_texts_of_mme_are_in_its_fingerprint(copy):
    data = copy("mme")
    shutil.copy(data / "mme/OCR/6610.txt", data / "mme/OCR/6620.txt")
    shutil.copy(data / "mme/OCR/6610.jpg", data / "mme/OCR/6620.jpg")
    [task] = find_tasks("mme")
    source = task.source(data)
    assert len(task.read(source)[0]) == 30
    assert len(source.read) == len(set(source.read)) == 15


# ------------------------------------------------------------------ the others


def test_options_are_asked_as_letters():
    seed = by_id("seed_bench")["101669"]
    assert words(seed) == (
        "How many squares are there?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER
    )
    assert (seed.expected, seed.kind) == (("A",), "Instances Counting")
    quality = by_id("q_bench")["q_bench#2"]
    assert (quality.expected, quality.kind) == (("C",), "what")
    assert words(quality).endswith("A. Noise\nB. Blur\nC. Blocks" + LETTER)


def test_seed_bench_asks_of_videos_too():
    video = by_id("seed_bench")["3000"]
    assert len(images(video)) == 8 and video.facts["media"] == "video"
    figures = score("seed_bench", lambda q: "B" if q.facts["media"] == "image" else "D")
    assert (figures["accuracy_image"], figures["accuracy_video"]) == (0.5, 0.5)


def test_rows_whose_answer_is_no_option_are_broken(copy):
    data = copy("q_bench")
    path = data / "q_bench/llvisionqa_dev.json"
    change(path, lambda rows: [{**rows[0], "correct_ans": "Perhaps"}, *rows[1:]])
    [broken] = read("q_bench", data)[1]
    assert broken.id == "q_bench#1" and "'Perhaps' is none of its options" in broken.reason
    data = copy("seed_bench")
    path = data / "seed_bench/SEED-Bench.json"
    change(
        path, lambda file: file | {"questions": [{**q, "answer": "E"} for q in file["questions"]]}
    )
    assert len(read("seed_bench", data)[1]) == 4


def test_a_segment_that_is_none_is_broken(copy):
    data = copy("seed_bench")
    path = data / "seed_bench/SEED-Bench.json"
    change(path, lambda f: f | {"questions": [{**q, "segment": ["a"]} for q in f["questions"]]})
    questions, broken = read("seed_bench", data)
    assert len(questions) == 2 and len(broken) == 2  # images have no use for it
    assert "its segment ['a'] is not two numbers" in broken[0].reason


def test_q_benchs_test_split_without_answers_is_refused(copy):
    data = copy("q_bench")
    path = data / "q_bench/llvisionqa_dev.json"
    change(path, lambda rows: [{k: v for k, v in r.items() if k != "correct_ans"} for r in rows])
    with pytest.raises(InputError, match=r"llvisionqa_dev\.json, row 1: 'correct_ans'.* missing"):
        read("q_bench", data)


def test_popes_splits_are_different_files_that_may_lie_together(tmp_path):
    texts = {name: by_id(f"pope_{name}")["2"].text for name in ("random", "popular")}
    assert texts == {
        "random": "Is there a kite in the image?",
        "popular": "Is there a person in the image?",
    }
    shutil.copytree(FIXTURES / "val2014", tmp_path / "val2014")
    for name in texts:
        file = f"coco_pope_{name}.json"
        (tmp_path / "pope").mkdir(exist_ok=True)
        shutil.copy(FIXTURES / f"pope_{name}" / file, tmp_path / "pope" / file)
        assert by_id(f"pope_{name}", tmp_path)["2"].text == texts[name]


def test_pope_that_always_says_yes():
    figures = score("pope_adversarial", lambda question: "Yes, there is.")
    assert figures["f1"] == pytest.approx(2 / 3)
    assert (figures["accuracy"], figures["recall"], figures["yes_ratio"]) == (0.5, 1, 1)


def test_a_label_that_is_neither_is_broken(copy):
    data = copy("pope_random")
    path = data / "pope_random/coco_pope_random.json"
    path.write_text(path.read_text().replace('"label": "no"', '"label": "maybe"', 1))
    [broken] = read("pope_random", data)[1]
    assert (broken.id, "'maybe'" in broken.reason) == ("2", True)


def test_the_judge_gets_what_the_benchmarks_give_it():
    vet = by_id("mm_vet")["v1_1"]
    assert vet.facts["reference"] == "square <AND> left<OR>a square is on the left"
    assert vet.facts["capabilities"] == ["rec", "spat"]
    hal = by_id("mmhal")["mmhal#1"]
    assert hal.facts == {"reference": "The square is white.", "content": "Square, Table"}
    assert (hal.kind, words(hal)) == ("attribute", hal.text)


# ------------------------------------------------------------------ videos


def test_videos_are_found_as_folders_and_files():
    assert {path.parent.name for path in images(by_id("msrvtt_qa")["158581"])} == {"video7010"}
    folders = [images(question)[0].parent for question in by_id("msvd_qa").values()]
    assert [folder.name for folder in folders] == ["vid1451", "made0_00002_0_9"]
    first, *_, last = images(by_id("tgif_qa")["tgif_qa#3"])
    assert str(first).endswith("tumblr_made2.gif, frame 1 of 8")
    left, right = (load_image(frame).convert("L") for frame in (first, last))
    assert left.getpixel((1, 4)) > 200 > right.getpixel((1, 4))  # the square moves to the right


def test_files_are_taken_where_there_is_no_folder(copy, monkeypatch):
    data = copy("msrvtt_qa")
    shutil.rmtree(data / "msrvtt_qa/frames/video7011")
    (data / "msrvtt_qa/TestVideo").mkdir()
    (data / "msrvtt_qa/TestVideo/video7011.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"video7011\.mp4: the package av"):
        read("msrvtt_qa", data)


def test_kinds_of_video_questions():
    assert [q.kind for q in by_id("msrvtt_qa").values()] == ["what", "how", "who"]
    assert [q.kind for q in by_id("tgif_qa").values()] == ["object", "number", "colour"]


def test_the_prompt_of_a_video_is_that_of_short_answers():
    assert words(by_id("msvd_qa")["37001"]) == "who is drawing a square?" + SHORT


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("msvd_qa", "youtube_mapping.txt", "one two three\n", "line 1: 'one two three'"),
        ("tgif_qa", "Test_frameqa_question.csv", "a,b\n1,2\n", "no column gif_name, question"),
        ("msrvtt_qa", "test_qa.json", '[{"id": 1}]', "row 1: 'video_id'"),
    ],
)
def test_what_is_wrong_in_a_videos_file_is_named(name, file, text, message, copy):
    data = copy(name)
    (data / name / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read(name, data)
