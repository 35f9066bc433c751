"""Opinion scores: the authors' rows from tables and JSON files."""

import csv
import json

import pytest

from owl2.data.datasets.opinion_scores import opinion_scores
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import put, split_skipped, summarize
from tests.errors import raises_input_error
from tests.scoring.golden import read

GOLDEN = read("deqa_score", "soft_labels.json")


def put_table(folder, rows):
    path = folder / "mos.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(params=["json", "rows", "table", "table with splits"])
def published(request, tmp_path):
    """The golden scores as a file, and the options that read it."""
    put(tmp_path, "split.json", GOLDEN["split"])
    options = {"split_file": "split.json"}
    if request.param == "json":
        return put(tmp_path, "mos.json", GOLDEN["mos"]), options
    if request.param == "rows":
        rows = [
            {"image": name, "gt_score": float(one["mos"]), "std": float(one["std"])}
            for name, one in GOLDEN["mos"].items()
        ]
        return put(tmp_path, "mos.json", rows), options
    rows = [{"name": n, "MOS": one["mos"], "SD": one["std"]} for n, one in GOLDEN["mos"].items()]
    names = {"image_column": "name", "mos_column": "MOS", "std_column": "SD"}
    if request.param == "table":
        return put_table(tmp_path, rows), options | names
    sets = {name: key for key in ("train", "test") for name in GOLDEN["split"][key]}
    sets = {name: {"train": "training"}.get(key, key) for name, key in sets.items()}
    rows = [row | {"set": sets.get(row["name"], "")} for row in rows]
    return put_table(tmp_path, rows), names | {"split_column": "set"}


@pytest.mark.parametrize("density", ["pdf", "cdf"])
def test_rows_equal_those_of_the_authors(published, density):
    file, options = published
    found = opinion_scores(file, density=density, prefix="IMAGES/", **options)
    samples, skipped = split_skipped(found)
    expected = GOLDEN[density]["train"]
    assert len(samples) == len(expected) > 10
    assert sum(skipped.values()) == len(GOLDEN["mos"]) - len(expected) > 0
    for sample, row in zip(samples, expected, strict=True):
        image, [(question, answer)] = summarize(sample)
        turns = [turn["value"] for turn in row["conversations"]]
        assert (image, answer) == (row["image"], turns[1])
        assert question == "<|image|>\n" + turns[0].removesuffix("\n<|image|>")
        assert sample.opinion.level_probs == pytest.approx(row["level_probs"], abs=1e-9)
        assert (sample.opinion.gt_score, sample.opinion.std) == (row["gt_score"], row["std"])


def test_scores_without_deviation_have_two_levels(tmp_path):
    scores = {"a": 0, "b": 10, "c": 6}
    file = put_table(tmp_path, [{"image": f"{n}.png", "mos": mos} for n, mos in scores.items()])
    samples, skipped = split_skipped(opinion_scores(file, task="aesthetics"))
    assert not skipped
    assert [summarize(sample)[1][0][1] for sample in samples] == [
        f"The aesthetics of the image is {level}." for level in ("bad", "excellent", "fair")
    ]
    assert samples[2].opinion.level_probs == pytest.approx((0, 0.4, 0.6, 0, 0), abs=1e-6)


def test_videos_have_one_frame_a_second(tmp_path):
    """A table as that of LSVQ."""
    rows = [{"name": name, "mos": mos, "is_test": mos == 1} for mos, name in enumerate("abc")]
    file = put_table(tmp_path, rows)
    columns = {"image_column": "name", "split_column": "is_test"}
    found, skipped = split_skipped(opinion_scores(file, kind="video", suffix=".mp4", **columns))
    sample, last = found
    assert sum(skipped.values()) == 1
    assert last.messages[1]["content"] == "The quality of the video is excellent."
    [part, question] = sample.messages[0]["content"]
    assert part == {"type": "video", "path": "a.mp4", "num_frames": "per_second"}
    assert question["text"].endswith(" this video?")
    assert sample.messages[1]["content"] == "The quality of the video is bad."


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([("a", 1), ("b", "x")], {}, (ErrorCode.INVALID_TYPE, "line 3", "'x'")),
        ([("a", 1), ("b", "nan")], {}, (ErrorCode.INVALID_TYPE, "line 3")),
        ([("a", 1), ("a", 2)], {}, (ErrorCode.CONFLICT, "line 3")),
        ([("a", 1), ("b", 1)], {}, (ErrorCode.EMPTY_DATASET,)),
        ([("a", 1)], {"mos_column": "MOS"}, (ErrorCode.MISSING_VALUE, "MOS", "image, mos")),
        ([("a", 1)], {"image_column": "name"}, (ErrorCode.MISSING_VALUE, "name")),
        ([("a", 1)], {"split_column": "set"}, (ErrorCode.MISSING_VALUE, "set")),
        ([("a", 1), ("b", 2)], {"kind": "video"}, (ErrorCode.INVALID_VALUE, "suffix")),
        ([("a.mp4", 1), ("b", 2)], {}, (ErrorCode.INVALID_VALUE, "kind")),
    ],
)
def test_refused_tables(tmp_path, rows, options, expected):
    file = put_table(tmp_path, [{"image": name, "mos": mos} for name, mos in rows])
    with raises_input_error(*expected):
        list(opinion_scores(file, **options))


def test_split_file_without_a_list(tmp_path):
    file = put_table(tmp_path, [{"image": "a", "mos": 1}, {"image": "b", "mos": 2}])
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"]}), encoding="utf-8")
    with raises_input_error(ErrorCode.MISSING_VALUE, "split.json", "test"):
        list(opinion_scores(file, split_file="split.json"))
