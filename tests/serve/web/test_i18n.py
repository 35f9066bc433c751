"""The texts of the page in both languages."""

import re
import string
from pathlib import Path

import pytest

from owl2.serve.errors import ApiError, too_busy
from owl2.serve.web import i18n
from owl2.serve.web.i18n import TEXTS, error_text, text, translations

PACKAGE = Path(i18n.__file__).parent
CHINESE = re.compile("[\u4e00-\u9fff]")
ALIKE = {"top_p"}  # not translated


def placeholders(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("key", TEXTS)
def test_every_text_has_both_languages(key):
    english, chinese = TEXTS[key]["en"], TEXTS[key]["zh"]
    assert english.strip() and not CHINESE.search(english)
    assert chinese.strip() and (key in ALIKE or CHINESE.search(chinese) or not placeholders(key))
    assert placeholders(english) == placeholders(chinese)


def test_chinese_texts_are_chinese():
    others = {key for key, texts in TEXTS.items() if not CHINESE.search(texts["zh"])}
    assert others <= {*ALIKE, "error_in_file"}


def test_every_text_is_used_and_every_used_text_exists():
    code = "".join(
        file.read_text("utf-8") for file in PACKAGE.glob("*.py") if file.name != "i18n.py"
    )
    code += (PACKAGE / "i18n.py").read_text("utf-8").partition("def text(")[2]
    quoted = set(re.findall(r"""["']([a-z_0-9]+)["']""", code))
    quoted |= {f"{key}_info" for key in quoted}  # of the settings
    assert set(TEXTS) <= quoted, "unused text"
    used = set(re.findall(r"""(?:\bi18n|\btext|\bshow_info)\(\s*["'](\w+)""", code))
    assert used <= set(TEXTS)
    assert len(used) > 25


def test_translations_have_the_same_keys():
    tables = translations()
    assert set(tables) == {"en", "zh", "zh-CN", "zh-TW"}
    assert {frozenset(table) for table in tables.values()} == {frozenset(TEXTS)}
    assert tables["en"]["clear"] != tables["zh-CN"]["clear"] == tables["zh"]["clear"]


def test_text_fills_placeholders_and_falls_back_to_english():
    assert text("image_number", "en", number=2) == "Image 2"
    assert text("image_number", "zh", number=2) == "图片 2"
    assert text("image", "de") == "Image"


def test_error_text_in_chinese_by_code():
    busy = too_busy("3 requests are waiting")
    assert "busy" in error_text(busy, "en")
    assert CHINESE.search(error_text(busy, "zh"))
    unknown = ApiError(400, "the prompt is too long")
    assert error_text(unknown, "zh") == error_text(unknown, "en") == "the prompt is too long"


def test_error_text_hides_internal_errors():
    internal = ApiError(500, "the stack")
    assert "stack" not in error_text(internal, "en") + error_text(internal, "zh")
