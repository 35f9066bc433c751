"""Fonts for the text of plots, whatever its script."""

import sys
import warnings
from pathlib import Path
from typing import Any

from owl2.files import translate_write_errors

DEFAULT_FONT = "DejaVu Sans"  # part of matplotlib
# Preferred over other fonts with the same characters, which may have them in other forms.
CHINESE_FONTS = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC")

_reported: set[str] = set()


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Save a matplotlib figure with fonts that contain the characters of its texts.

    The same figure gives the same SVG file.

    If no installed font has some of them, boxes are drawn, and standard error names the characters
    and a package to install, once per process.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families, missing = _select_fonts({char for text in texts for char in text.get_text()})
    for text in texts:
        text.set_fontfamily(families)
    if missing - _reported:
        _reported.update(missing)
        print(
            f"No font has the characters {''.join(sorted(missing))[:20]!r}: plots show boxes "
            "instead. For Chinese, Japanese and Korean, install the package fonts-noto-cjk (Debian "
            "and Ubuntu) or google-noto-sans-cjk-fonts (Fedora).",
            file=sys.stderr,
        )
    stable = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with (
        warnings.catch_warnings(),
        translate_write_errors(path),
        rc_context({"svg.hashsalt": "owl2"}),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=dpi, **stable)


def _select_fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """The names of fonts for the characters, and the characters that no font has."""
    from matplotlib.font_manager import fontManager, get_font

    missing = {char for char in characters if char.isprintable()}
    # "Last Resort", part of matplotlib, has a box for each character.
    fonts = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]
    fonts.sort(key=lambda font: (font.name != DEFAULT_FONT, font.name not in CHINESE_FONTS))
    families: list[str] = []
    for font in fonts:
        if missing and (found := missing & set(map(chr, get_font(font.fname).get_charmap()))):
            families.append(font.name)
            missing -= found
    return families or [DEFAULT_FONT], missing
