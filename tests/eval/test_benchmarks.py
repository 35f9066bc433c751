"""Values, prompts and categories of single benchmarks."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from owl2.errors import ErrorCode
from owl2.eval.readers import special
from owl2.eval.tasks import EvalTask, find_tasks
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.eval.reading import (
    FIXTURES,
    LETTER_REQUEST,
    REQUEST,
    by_id,
    images,
    prompt_text,
    read,
    score,
)

CAPTION = "Provide a one-sentence caption for the provided image."


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixture of a benchmark, in the directory for --data."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        return tmp_path

    return make


# ------------------------------------------------------------------ captions and short answers


def test_captions():
    pytest.importorskip("pycocoevalcap")
    samples, [missing] = read("coco")
    assert [sample.id for sample in samples] == ["1101", "1102"]
    assert prompt_text(samples[0]) == CAPTION
    assert samples[0].expected[1] == "Nothing but a red wall."
    assert len(samples[1].expected) == 5
    assert missing.id == "1199"
    assert "val2014/COCO_val2014_000000001199.jpg" in missing.reason
    samples, invalid = read("flickr30k")
    assert [sample.id for sample in samples] == ["2201.jpg", "2203.jpg"]
    assert [item.id for item in invalid] == ["2204.jpg"]
    # The prompt "short" is the question alone, which is the request.
    assert prompt_text(read("coco", prompt="short")[0][0]) == CAPTION
    assert read("coco", prompt="What is it?")[0][0].question == "What is it?"


def test_captions_need_the_package_for_cider(monkeypatch):
    monkeypatch.setattr("owl2.errors.find_spec", lambda name: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "pycocoevalcap"):
        read("coco")


@pytest.mark.parametrize(("name", "count"), [("coco", 2), ("vqav2", 3)])
def test_images_may_be_next_to_the_file(copy, name, count):
    data = copy(name)
    for image in (FIXTURES / "val2014").iterdir():
        shutil.copy(image, data / name)
    assert len(read(name, data)[0]) == count


def test_vqav2():
    samples, invalid = read("vqav2")
    assert [sample.id for sample in samples] == ["1101000", "1101001", "1102000"]
    assert [sample.category for sample in samples] == ["yes/no", "number", "other"]
    assert samples[1].question == "How many walls are there?"
    assert prompt_text(samples[1]) == samples[1].question + REQUEST
    assert samples[1].expected == (*["1"] * 6, "2", "2", "0", "3")
    assert [item.id for item in invalid] == ["1199000"]


def test_okvqa():
    sample = by_id("okvqa")["11020"]
    assert sample.category == "Science and Technology"
    assert sample.expected[:4] == ("scattering", "scattering", "scatter", "scatter")
    assert len(sample.expected) == 10


def test_gqa_vizwiz_and_textvqa():
    samples = by_id("gqa")
    assert [sample.category for sample in samples.values()] == ["open", "binary", "binary"]
    assert samples["20003"].expected == ("t-shirt",)
    samples = by_id("vizwiz")
    assert [sample.category for sample in samples.values()] == ["other", "unanswerable"]
    assert samples["VizWiz_val_00000001.jpg"].expected.count("grey") == 6
    samples, invalid = read("textvqa")
    assert [sample.id for sample in samples] == ["34602", "34603"]
    assert prompt_text(samples[0]) == "what does the sign say?" + REQUEST
    assert [item.id for item in invalid] == ["34604"]


# ------------------------------------------------------------------ multiple choice


def test_science_qa():
    [hot, sea], [missing] = read("science_qa")
    assert (hot.id, hot.category, hot.expected) == ("11", "natural science", ("B",))
    assert prompt_text(hot) == (
        "The image shows lava.\nWhich of these is hotter?\nA. ice\nB. lava" + LETTER_REQUEST
    )
    assert prompt_text(sea).startswith("N/A\nWhich sea is shown?\nA. the North")
    assert sea.metadata["options"][3] == "the Black Sea"
    assert missing.id == "14", "12 has no image and is not part of IMG"


def test_options_have_letters():
    seed = by_id("seed_bench")["101669"]
    assert prompt_text(seed) == (
        "N/A\nHow many squares are there?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER_REQUEST
    )
    assert (seed.expected, seed.category) == (("A",), "Instances Counting")
    quality = by_id("q_bench")["q_bench#2"]
    assert (quality.expected, quality.category) == (("C",), "what")
    assert prompt_text(quality).endswith("A. Noise\nB. Blur\nC. Blocks" + LETTER_REQUEST)


def test_segments_of_breakfast_are_in_frames(copy):
    """Task 12 of SEED-Bench counts at 15 frames per second, the others in seconds."""
    path = copy("seed_bench") / "seed_bench/SEED-Bench.json"
    content = json.loads(path.read_text())
    videos = [row for row in content["questions"] if row["data_type"] == "video"]
    for row, kind, segment in zip(videos, (11, 12), ([2, 8.5], [18, 166]), strict=True):
        shutil.rmtree(path.parent / "SEED-Bench-video" / Path(row["data_id"]).stem)
        (path.parent / "SEED-Bench-video" / row["data_id"]).write_bytes(b"")
        row.update(question_type_id=kind, segment=segment)
    path.write_text(json.dumps(content))
    pytest.importorskip("av")
    samples = by_id("seed_bench", path.parent.parent)
    assert images(samples["2000"])[0].segment == (2, 8.5)
    assert images(samples["3000"])[0].segment == pytest.approx((1.2, 166 / 15))


def test_seed_bench_has_videos():
    video = by_id("seed_bench")["3000"]
    assert len(images(video)) == 8 and video.metadata["media"] == "video"
    metrics = score("seed_bench", lambda q: "B" if q.metadata["media"] == "image" else "D")
    assert (metrics["accuracy_image"], metrics["accuracy_video"]) == (0.5, 0.5)


# ------------------------------------------------------------------ MME, POPE, judged benchmarks


def test_mme_has_the_prompt_of_the_task():
    samples = by_id("mme")
    sample = samples["posters/tt6605#2"]
    assert sample.question == "Is this a poster of a play?"
    assert prompt_text(sample) == sample.question + " \n" + REQUEST.strip()
    [plain] = [item for item in read("mme", prompts="plain")[0] if item.id == sample.id]
    assert prompt_text(plain) == sample.question + "\n" + REQUEST.strip()
    assert (sample.expected, sample.category) == (("No",), "posters")
    assert all(sample.category == sample.metadata["category"] for sample in samples.values())


def test_text_of_mme_with_another_format_is_invalid(copy):
    data = copy("mme")
    (data / "mme/OCR/6610.txt").write_text("Is it?\tYes\nIs it not?\tPerhaps\n")
    (data / "mme/OCR/6620.txt").write_text("Is it?\tYes\n")
    (data / "mme/count/notes.txt").write_bytes("caf\xe9\tYes".encode("latin-1"))
    shutil.copy(data / "mme/OCR/6610.jpg", data / "mme/OCR/6620.jpg")
    [task] = find_tasks("mme")
    files = task.data(data)
    samples, invalid = task.read(files)
    assert len(samples) == 27
    assert {item.id for item in invalid} == {"OCR/6610", "count/notes"}
    reasons = " ".join(item.reason for item in invalid)
    assert "6610.txt, line 2: 'Is it not?\\tPerhaps'" in reasons and "notes.txt" in reasons
    assert len(files.files) == len(set(files.files)) == 16, "the fingerprint covers all texts"


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("mme", {"perception": 500, "cognition": 200}),
        ("pope_adversarial", {"f1": 2 / 3, "accuracy": 0.5, "recall": 1, "yes_ratio": 1}),
    ],
)
def test_scores_of_a_constant_yes(name, metrics):
    found = score(name, lambda sample: "Yes, there is.")
    assert {key: found[key] for key in metrics} == pytest.approx(metrics)


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


def test_categories_and_prompt_of_video_questions():
    assert [q.category for q in by_id("msrvtt_qa").values()] == ["what", "how", "who"]
    assert [q.category for q in by_id("tgif_qa").values()] == ["object", "number", "color"]
    assert prompt_text(by_id("msvd_qa")["37001"]) == "who is drawing a square?" + REQUEST


# ------------------------------------------------------------------ text


def test_mmlu():
    samples, [item] = read("mmlu")
    assert [sample.id for sample in samples] == ["anatomy#1", "astronomy#1"]
    assert [sample.category for sample in samples] == ["anatomy", "astronomy"]
    assert samples[1].expected == ("C",)
    choices = ["a foot", "a tail, of a fish", "a wing", "an eye"]
    expected = {"question": "Which of these has toes, and no fin?", "subject": "anatomy"}
    assert samples[0].metadata == {**expected, "choices": choices, "answer": 0}
    assert item.id == "anatomy#2"
    assert "'E'" in item.reason


def test_bbh():
    samples, _ = read("bbh")
    assert [sample.category for sample in samples] == ["boolean_expressions"] * 2 + ["word_sorting"]
    assert samples[0].metadata == {"input": "not ( False ) is", "target": "True"}


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("bbh", "bbh/*.json", "bbh"),
        ("bbh", "bbh/*.json", "."),
        ("agieval", "v1/*.jsonl", "agieval"),
        ("agieval", "v1/*.jsonl", "."),
        ("agieval", "v1/*.jsonl", "v1"),
        ("mmlu", "test/*.csv", "mmlu"),
        ("mmlu", "test/*.csv", "."),
        ("xsum", "test.jsonl", "xsum"),
    ],
)
def test_files_may_be_in_the_directory_of_the_task_or_of_all_tasks(name, source, target, tmp_path):
    (tmp_path / target).mkdir(exist_ok=True)
    for path in (FIXTURES / name).glob(source):
        file = "xsum_test.jsonl" if name == "xsum" else path.name
        shutil.copy(path, tmp_path / target / file)
    other = FIXTURES / "hellaswag/hellaswag_val.jsonl"
    shutil.copy(other, tmp_path)
    shutil.copy(FIXTURES / "coco/dataset_coco.json", tmp_path)
    assert by_id(name, tmp_path) == by_id(name)


@pytest.mark.parametrize(
    ("label", "gold"),
    [("B", [1]), (["B"], [1]), ("AC", []), ("A B D", []), (["A", "C", "D", "。"], []), ([], [])],
)
def test_labels_of_agieval_are_sets(label, gold, tmp_path):
    """Malformed labels count as questions without a correct letter, as in its script."""
    row = {"passage": "P ", "question": " q\n", "options": ["(A)1 ", "(B)2"], "label": label}
    (tmp_path / "sat-en.jsonl").write_text(json.dumps(row))
    [sample], invalid = read("agieval", tmp_path)
    assert (sample.metadata["gold"], invalid) == (gold, [])
    assert sample.metadata["query"] == (
        "P Q:  q\n Answer Choices: (A)1  (B)2\nA: Among A through B, the answer is"
    )


def test_agieval_has_the_prompts_of_its_authors():
    samples = by_id("agieval")
    assert samples.pop("aqua-rat#2").metadata["gold"] == [5], "two options, the label F: wrong"
    metadata = {sample.category: sample.metadata for sample in samples.values()}
    assert metadata["aqua-rat"]["query"] == (
        "Q: How much is 3 + 4? Answer Choices: (A)5 (B)6 (C)7 (D)8 (E)9\n"
        "A: Among A through E, the answer is"
    )
    assert metadata["sat-en"]["query"].startswith("An owl sat on a post. Q: Where did it sit?")
    assert metadata["gaokao-physics"]["query"] == (
        "问题：哪些是颜色？ 选项：(A)红 (B)蓝 (C)三 (D)五\n答案：从A到D, 我们应选择"
    )
    assert metadata["gaokao-physics"]["gold"] == [], "one letter is not the set of two"
    assert metadata["math"]["query"] == "Q: What is $2 \\cdot 3$?\nA: The answer is"
    assert (metadata["math"]["answer"], metadata["math"]["gold"]) == ("6", None)


@pytest.mark.parametrize(
    ("name", "ids", "expected", "invalid"),
    [
        ("arc_c", ["Made_1", "Made_2"], ["B", "1"], ["Made_3"]),
        ("arc_e", ["Made_4"], ["A"], []),
        ("boolq", ["val#1", "val#2"], ["yes", "no"], ["val#3"]),
        ("hellaswag", ["val#1", "val#2"], ["takes it.", "Be still."], ["val#3"]),
        ("triviaqa", ["web/m_1", "wikipedia/m_1"], ["The owl"] * 2, ["wikipedia/m_2"]),
        ("xsum", ["1"], ["A town has lost its owl."], ["2"]),
    ],
)
def test_other_text_benchmarks(name, ids, expected, invalid):
    samples, skipped = read(name)
    assert [sample.id for sample in samples] == ids
    assert [sample.expected[0] for sample in samples] == expected
    assert [item.id for item in skipped] == invalid


def test_boolq_of_super_glue(tmp_path):
    row = {"question": "can owls fly", "passage": "Owls fly.", "idx": 0, "label": True}
    (tmp_path / "val.jsonl").write_text(json.dumps(row))
    [sample], _ = read("boolq", tmp_path)
    assert (sample.expected, sample.metadata["label"]) == (("yes",), 1)


def test_xsum_in_the_files_of_the_authors():
    [task] = find_tasks("xsum")
    moved = EvalTask("xsum_files", task.config)
    [sample], [invalid] = moved.read(moved.data(FIXTURES))
    assert sample.question == "The owl of the town hall has left.\nNobody knows where it went."
    assert sample.expected == ("A town has lost its owl.",)
    assert prompt_text(sample).endswith("in one sentence.")
    assert invalid.id == "102"


def test_page_lines_of_xsum_are_removed(tmp_path):
    """As the loader of the hub does: complete lines only, and empty lines."""
    shutil.copytree(FIXTURES / "xsum_files", tmp_path / "xsum")
    path = tmp_path / "xsum/bbc-summary-data/101.summary"
    lines = ("Share this with", "Email", "LinkedIn", "Copy this link", "One line.", "", "Email me")
    text = path.read_text().partition("[SN]RESTBODY[SN]\n")[0]
    path.write_text(text + "[SN]RESTBODY[SN]\n" + "\n".join(lines))
    assert read("xsum", tmp_path)[0][0].question == "One line.\nEmail me"


def test_long_articles_are_truncated(monkeypatch):
    monkeypatch.setattr(special, "XSUM_WORDS", 3)
    assert read("xsum")[0][0].question == "The owl of"
