"""`owl2 attend`: its figures and numbers, and what it refuses."""

import sys

import numpy as np
import pytest
from PIL import Image

from owl2 import cli
from owl2.attention import command as command
from tests.engine.conftest import image


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, tiny_checkpoint):
    """Runs `owl2 attend` on an image; gives exit code and what was printed."""
    for number in (1, 2):
        image(number, size=(20, 12)).save(tmp_path / f"{number}.png")

    def attend(*arguments, images=("1.png",)):
        options = [part for name in images for part in ("--image", str(tmp_path / name))]
        base = ["owl2", "attend", "--model", str(tiny_checkpoint), "--device", "cpu"]
        output = ["--output", str(tmp_path / "out")]
        monkeypatch.setattr(
            sys, "argv", [*base, "--dtype", "float32", *output, *options, *arguments]
        )
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return attend


def test_figures_and_numbers(run, tmp_path):
    code, shown = run(
        "what is this?", "--answer", "a red circle", "--compare-no-mam", "--layers", "-1,mean"
    )
    assert code == 0, shown.err
    assert shown.out.startswith("a red circle\nthe figures and the numbers are in ")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"attention.png", "shares.png", "heat.png", "attention.npz"}
    for name in files - {"attention.npz"}:
        with Image.open(tmp_path / "out" / name) as figure:
            assert min(figure.size) > 200
    with np.load(tmp_path / "out" / "attention.npz", allow_pickle=False) as numbers:
        found = dict(numbers)
    tokens, positions = len(found["tokens"]), found["spans"][-1][1]
    assert "".join(found["tokens"]) == " a red circle"
    assert found["words"].tolist() == ["a", "red", "circle"]
    assert found["layers"].tolist() == [1]
    assert found["kinds"].tolist() == ["text", "image", "text", "answer"]
    assert found["images"].tolist() == [-1, 0, -1, -1]
    for before in ("", "without_mam_"):
        assert found[f"{before}attention"].shape == (1, 4, tokens, positions)
        assert found[f"{before}heat"].shape == (3, 1, 2, 2)
        np.testing.assert_allclose(found[f"{before}mean"].sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(found[f"{before}shares"].sum(-1), 1, atol=1e-5)


def test_two_images_one_word_and_again_into_the_same_folder(run, tmp_path):
    arguments = ("what is this?", "--answer", "red and $red$ \\x", "--token", "and")
    assert run(*arguments, images=("1.png", "2.png"))[0] == 0
    assert run(*arguments, images=("1.png", "2.png"))[0] == 0
    with np.load(tmp_path / "out" / "attention.npz") as numbers:
        assert numbers["heat"].shape == (1, 2, 2, 2)
        assert not any(name.startswith("without_mam") for name in numbers)


def test_without_a_image_there_is_nothing_to_paint(run, tmp_path):
    assert run("what is this?", "--answer", "yes", images=())[0] == 0
    assert not (tmp_path / "out" / "heat.png").exists()


def test_a_word_is_painted_once(run, tmp_path):
    run("what?", "--answer", "a red a Red a", "--layers", "mean")
    with np.load(tmp_path / "out" / "attention.npz") as numbers:
        assert numbers["words"].tolist() == ["a", "red"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "0,7"], "There is no layer 7: they go from 0 to 1."),
        (["--layers", "first"], "--layers has 'first'"),
        (["--answer", "a circle", "--token", "blue"], "'blue' is not in the answer"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_what_a_user_got_wrong(run, tmp_path, arguments, said):
    code, shown = run("what is this?", *arguments)
    assert code == 2 and said in shown.err and "Traceback" not in shown.err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    code, shown = run("what is this?")
    assert code == 2 and "thesis.tex" in shown.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, shown = run("what is this?")
    assert code == 2 and "pip install 'owl2-vlm[plot]'" in shown.err


def test_the_papers_layers_by_default():
    assert command._layers(None, 32) == [0, 15, 31, None]
    assert command._layers(None, 1) == [0, None]
    assert command._layers("-1, mean,0", 3) == [2, None, 0]
