"""Plots with characters that matplotlib's own font does not have."""

import warnings

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from owl2 import fonts
from owl2.errors import ErrorCode
from tests.errors import raises_input_error

CHINESE = "图里是什么颜色？"


@pytest.fixture
def installed(monkeypatch):
    """Lets the tests select the installed fonts."""

    def install(*names):
        entries = [font for font in font_manager.fontManager.ttflist if font.name in names]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
        monkeypatch.setattr(fonts, "_reported", set())

    return install


def draw(path, text):
    figure = Figure()
    title = figure.suptitle(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fonts.save_figure(figure, path, dpi=50)
    assert path.is_file()
    return title.get_fontfamily()


def test_missing_font_is_named_once_and_without_warnings(tmp_path, installed, capfd):
    installed("DejaVu Sans")
    draw(tmp_path / "a.png", CHINESE)
    draw(tmp_path / "b.png", CHINESE)
    printed = capfd.readouterr().err
    assert printed.count("fonts-noto-cjk") == 1
    assert "色" in printed


def test_a_font_with_the_characters_is_selected(tmp_path, installed, capfd):
    installed("DejaVu Sans", "STIXGeneral")
    only_in_stix = "\u2a23"
    assert draw(tmp_path / "a.png", f"{only_in_stix} red") == ["DejaVu Sans", "STIXGeneral"]
    assert capfd.readouterr().err == ""


def test_latin_text_needs_no_other_font(tmp_path, installed, capfd):
    installed("DejaVu Sans", "STIXGeneral")
    assert draw(tmp_path / "a.png", "red → 50%\nnew line") == ["DejaVu Sans"]
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_an_input_error(tmp_path):
    path = tmp_path / "a.png"
    path.symlink_to("/dev/full")
    with raises_input_error(ErrorCode.WRITE_FAILED, path):
        fonts.save_figure(Figure(), path, dpi=50)
