"""`owl2 attend`: figures, arrays and errors."""

import sys

import numpy as np
import pytest
from PIL import Image

from tests.engine.conftest import random_image


@pytest.fixture
def attend(run_cli, tmp_path, tiny_checkpoint):
    """Run `owl2 attend` on images of `tmp_path`; the output directory is ``out``."""
    for number in (1, 2):
        random_image(number, size=(20, 12)).save(tmp_path / f"{number}.png")

    def run(*arguments, images=("1.png",)):
        options = [option for name in images for option in ("--image", tmp_path / name)]
        model = ["--model", tiny_checkpoint, "--device", "cpu", "--dtype", "float32"]
        return run_cli("attend", *model, "--output", tmp_path / "out", *options, *arguments)

    return run


@pytest.fixture
def arrays(tmp_path):
    """Read attention.npz."""

    def read():
        with np.load(tmp_path / "out" / "attention.npz", allow_pickle=False) as file:
            return dict(file)

    return read


def test_figures_and_arrays(attend, arrays, tmp_path):
    result = attend(
        "what is this?", "--answer", "a red circle", "--compare-no-mam", "--layers", "-1,mean"
    )
    assert result.exit_code == 0, result.stderr
    answer, where = result.stdout.splitlines()
    assert answer == "a red circle" and str(tmp_path / "out") in where
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"attention.png", "shares.png", "heatmap.png", "attention.npz"}
    for name in files - {"attention.npz"}:
        with Image.open(tmp_path / "out" / name) as figure:
            assert min(figure.size) > 200
    saved = arrays()
    tokens, positions = len(saved["tokens"]), saved["spans"][-1][1]
    assert "".join(saved["tokens"]) == " a red circle"
    assert saved["words"].tolist() == ["a", "red", "circle"]
    assert saved["layers"].tolist() == [1]
    assert saved["kinds"].tolist() == ["text", "image", "text", "answer"]
    assert saved["images"].tolist() == [-1, 0, -1, -1]
    for prefix in ("", "no_mam_"):
        assert saved[f"{prefix}attention"].shape == (1, 4, tokens, positions)
        assert saved[f"{prefix}heat"].shape == (3, 1, 2, 2)
        np.testing.assert_allclose(saved[f"{prefix}mean"].sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(saved[f"{prefix}shares"].sum(-1), 1, atol=1e-5)


def test_output_of_an_earlier_call_is_replaced(attend, arrays, tmp_path):
    assert attend("what is this?", "--answer", "yes", images=()).exit_code == 0
    assert not (tmp_path / "out" / "heatmap.png").exists()
    assert arrays()["layers"].tolist() == [0, 1]  # the default, those of the paper
    arguments = ("what is this?", "--answer", "red and $red$ \\x", "--token", "and")
    assert attend(*arguments, images=("1.png", "2.png")).exit_code == 0
    assert (tmp_path / "out" / "heatmap.png").exists()
    assert arrays()["heat"].shape == (1, 2, 2, 2)
    assert not any(name.startswith("no_mam") for name in arrays())


def test_a_repeated_word_gets_one_heat_map(attend, arrays):
    attend("what?", "--answer", "a red a Red a", "--layers", "mean")
    assert arrays()["words"].tolist() == ["a", "red"]


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--layers", "0,7"], "7"),
        (["--layers", "first"], "first"),
        (["--answer", "a circle", "--token", "blue"], "blue"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_user_errors(attend, tmp_path, arguments, needle):
    result = attend("what is this?", *arguments)
    assert result.exit_code == 2 and needle in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_files_is_not_replaced(attend, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    result = attend("what is this?")
    assert result.exit_code == 2 and "thesis.tex" in result.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_missing_matplotlib(attend, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = attend("what is this?")
    assert result.exit_code == 2 and "owl2-vlm[plot]" in result.stderr
