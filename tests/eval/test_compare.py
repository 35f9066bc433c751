"""The comparison of two runs: intervals, differing conditions, and the page."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.eval.compare import bootstrap_interval, compare
from tests.errors import raises_input_error


def run(folder, scores, responses=None, prompt="{question}", name="task", image=""):
    """A directory that `owl2 eval` wrote; scores by the ids of the samples."""
    (folder / "responses").mkdir(parents=True)
    entry = {"prompt": prompt, "generation": {"mam": prompt == "{question}"}}
    (folder / "results.json").write_text(json.dumps({"tasks": {name: entry}}))
    lines = [
        {
            "id": key,
            "question": f"what is {key} <here>?",
            "images": [image] if image else [],
            "expected": ["a", "a", "b"],
            "response": (responses or {}).get(key, "a"),
            "score": score,
        }
        for key, score in scores.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "responses" / f"{name}.jsonl").write_text(text)
    return folder


def test_bootstrap_resamples_the_samples():
    differences = np.random.default_rng(1).choice([-1, 0, 0, 0, 1, 1], 300)
    draws = np.random.default_rng(2).choice(differences, (20_000, 300)).mean(1)
    expected = np.percentile(draws, [2.5, 97.5])
    assert bootstrap_interval(differences) == pytest.approx(tuple(expected), abs=0.008)
    assert bootstrap_interval(differences) == bootstrap_interval(differences), "deterministic"


def test_interval_of_equal_runs_contains_zero():
    assert bootstrap_interval([0.0] * 10) == (0.0, 0.0)
    low, high = bootstrap_interval([1.0, -1.0] * 50)
    assert low < 0 < high


def test_pairs_have_equal_ids_and_two_scores(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0, "2": 0.0, "3": 0.5, "4": None, "5": 1.0})
    second = run(tmp_path / "b", {"3": 0.5, "2": 1.0, "1": 0.0, "4": 1.0, "6": 1.0}, {"3": "b"})
    [found] = compare(first, second, tmp_path / "page.html", plain)
    assert [first["id"] for first, _ in found.pairs] == ["1", "2", "3"]
    cells = found.cells()
    assert (cells["A"], cells["B"]) == ("50.0%", "50.0%")
    assert [second["score"] - first["score"] for first, second in found.differing] == [-1.0, 1.0]
    assert [*cells.values()][6:] == ["1", "1", "1"]
    assert found.differences == []


def test_page_has_differing_samples_with_images(tmp_path, plain):
    image = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(image)
    first = run(tmp_path / "a", {"1": 1.0, "2": 0.0}, {"1": "<script>"}, image=str(image))
    second = run(tmp_path / "b", {"1": 0.0, "2": 0.0}, image=str(image))
    compare(first, second, tmp_path / "page.html", plain)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article>") == 1
    assert page.count("data:image/jpeg;base64,") == 1
    assert "what is 1 &lt;here&gt;?" in page
    assert "what is 2" not in page
    assert 'class="better">A: &lt;script&gt; (1.00)' in page
    assert 'class="worse">B: a (0.00)' in page
    assert "Expected: a or b" in page


def test_page_has_frames_of_videos(tmp_path, plain):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=500)
    name = f"{tmp_path / 'x.gif'}, frame 2 of 2"
    first = run(tmp_path / "a", {"1": 1.0}, image=name)
    compare(first, run(tmp_path / "b", {"1": 0.0}), tmp_path / "page.html", plain)
    page = (tmp_path / "page.html").read_text()
    encoded = page.partition("data:image/jpeg;base64,")[2].partition('"')[0]
    red, green, blue = Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((4, 4))
    assert blue > 200 > red + green


def test_page_has_copied_images_of_a_moved_run(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0}, image="images/f.jpg")
    (first / "responses" / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(first / "responses" / "images" / "f.jpg")
    moved = first.rename(tmp_path / "moved")
    compare(moved, run(tmp_path / "b", {"1": 0.0}), tmp_path / "page.html", plain)
    assert "data:image/jpeg;base64," in (tmp_path / "page.html").read_text()


def test_page_names_missing_images(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0}, image="/no/where.png")
    second = run(tmp_path / "b", {"1": 0.0}, image="/no/where.png")
    compare(first, second, tmp_path / "page.html", plain)
    assert "/no/where.png" in (tmp_path / "page.html").read_text()


def test_differing_conditions_are_printed(tmp_path, plain):
    first, second = run(tmp_path / "a", {"1": 1.0}), run(tmp_path / "b", {"1": 1.0}, prompt="Q")
    [found] = compare(first, second, tmp_path / "page.html", plain)
    assert found.differences == [
        "prompt is '{question}' in A, 'Q' in B",
        "generation.mam is True in A, False in B",
    ]
    assert "generation.mam is True in A" in plain.file.getvalue()


def test_runs_without_common_tasks_are_an_error(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0})
    for other, code, needle in (
        (tmp_path / "none", ErrorCode.FILE_NOT_FOUND, "none/results.json"),
        (run(tmp_path / "b", {"1": 1.0}, name="other"), ErrorCode.EMPTY_DATASET, tmp_path / "b"),
        (run(tmp_path / "c", {"1": None}), ErrorCode.EMPTY_DATASET, tmp_path / "c"),
    ):
        with raises_input_error(code, needle):
            compare(first, other, tmp_path / "page.html", plain)
    assert not (tmp_path / "page.html").exists()
