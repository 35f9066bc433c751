"""Two runs side by side: intervals, what differs, and the page."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.eval.compare import compare, interval


def run(folder, scores, answers=None, prompt="{question}", name="task", image=""):
    """A folder as `owl2 eval` writes it; scores by the questions' ids."""
    (folder / "answers").mkdir(parents=True)
    entry = {"prompt": prompt, "decoding": {"mam": prompt == "{question}"}}
    (folder / "results.json").write_text(json.dumps({"tasks": {name: entry}}))
    lines = [
        {
            "id": key,
            "question": f"what is {key} <here>?",
            "images": [image] if image else [],
            "expected": ["a", "a", "b"],
            "answer": (answers or {}).get(key, "a"),
            "score": score,
        }
        for key, score in scores.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "answers" / f"{name}.jsonl").write_text(text)
    return folder


def test_the_bootstrap_is_the_one_of_questions():
    differences = np.random.default_rng(1).choice([-1, 0, 0, 0, 1, 1], 300)
    draws = np.random.default_rng(2).choice(differences, (20_000, 300)).mean(1)
    expected = np.percentile(draws, [2.5, 97.5])
    assert interval(differences) == pytest.approx(tuple(expected), abs=0.008)
    assert interval(differences) == interval(differences), "the same each time"


def test_an_interval_of_no_difference():
    assert interval([0.0] * 10) == (0.0, 0.0)
    low, high = interval([1.0, -1.0] * 50)
    assert low < 0 < high


def test_pairs_are_made_by_id_and_only_of_scored_ones(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0, "2": 0.0, "3": 0.5, "4": None, "5": 1.0})
    second = run(tmp_path / "b", {"3": 0.5, "2": 1.0, "1": 0.0, "4": 1.0, "6": 1.0}, {"3": "b"})
    [found] = compare(first, second, tmp_path / "page.html", plain)
    assert [pair.first["id"] for pair in found.pairs] == ["1", "2", "3"]
    assert found.means == (0.5, 0.5)
    assert [pair.difference for pair in found.differing] == [-1.0, 1.0]
    assert found.cells()[6:] == ("1", "1", "1")
    assert found.unlike == []


def test_the_page_shows_where_they_differ_with_images(tmp_path, plain):
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


def test_the_page_shows_frames_of_videos(tmp_path, plain):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=500)
    name = f"{tmp_path / 'x.gif'}, frame 2 of 2"
    first = run(tmp_path / "a", {"1": 1.0}, image=name)
    compare(first, run(tmp_path / "b", {"1": 0.0}), tmp_path / "page.html", plain)
    page = (tmp_path / "page.html").read_text()
    encoded = page.partition("data:image/jpeg;base64,")[2].partition('"')[0]
    red, green, blue = Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((4, 4))
    assert blue > 200 > red + green


def test_the_page_shows_copies_wherever_the_run_is(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0}, image="images/f.jpg")
    (first / "answers" / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(first / "answers" / "images" / "f.jpg")
    moved = first.rename(tmp_path / "moved")
    compare(moved, run(tmp_path / "b", {"1": 0.0}), tmp_path / "page.html", plain)
    assert "data:image/jpeg;base64," in (tmp_path / "page.html").read_text()


def test_a_image_that_is_gone_is_said(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0}, image="/no/where.png")
    second = run(tmp_path / "b", {"1": 0.0}, image="/no/where.png")
    compare(first, second, tmp_path / "page.html", plain)
    assert "/no/where.png" in (tmp_path / "page.html").read_text()


def test_what_else_is_different_is_said(tmp_path, plain):
    first, second = run(tmp_path / "a", {"1": 1.0}), run(tmp_path / "b", {"1": 1.0}, prompt="Q")
    [found] = compare(first, second, tmp_path / "page.html", plain)
    assert found.unlike == [
        "prompt is '{question}' in A, 'Q' in B",
        "decoding.mam is True in A, False in B",
    ]
    assert "decoding.mam is True in A" in plain.file.getvalue()


def test_nothing_to_compare(tmp_path, plain):
    first = run(tmp_path / "a", {"1": 1.0})
    for other, words in (
        (tmp_path / "none", r"none/results\.json is not there"),
        (run(tmp_path / "b", {"1": 1.0}, name="other"), "no task with scores in common"),
        (run(tmp_path / "c", {"1": None}), "no task with scores in common"),
    ):
        with pytest.raises(InputError, match=words):
            compare(first, other, tmp_path / "page.html", plain)
    assert not (tmp_path / "page.html").exists()
