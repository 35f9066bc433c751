"""The page's words: all of them, in both languages."""

import re
import string
from pathlib import Path

import pytest

from owl2.serve.errors import ApiError, too_busy
from owl2.serve.web import i18n
from owl2.serve.web.i18n import TEXTS, error_text, text, translations

ROOM = Path(i18n.__file__).parent
CHINESE = re.compile("[\u4e00-\u9fff]")
ALIKE = {"top_p"}  # a name that Chinese has not


def holes(words):
    return {name for _, name, _, _ in string.Formatter().parse(words) if name is not None}


@pytest.mark.parametrize("key", TEXTS)
def test_every_key_is_there_in_both_languages(key):
    english, chinese = TEXTS[key]
    assert english.strip() and not CHINESE.search(english)
    assert chinese.strip() and (key in ALIKE or CHINESE.search(chinese) or not holes(key))
    assert holes(english) == holes(chinese)


def test_most_chinese_is_chinese():
    assert {key for key, (_, words) in TEXTS.items() if not CHINESE.search(words)} <= {
        *ALIKE,
        "error_in_file",
    }


def test_keys_that_are_used_are_those_that_are_there():
    code = "".join(file.read_text("utf-8") for file in ROOM.glob("*.py") if file.name != "texts.py")
    code += (ROOM / "texts.py").read_text("utf-8").partition("def text(")[2]
    quoted = set(re.findall(r"""["']([a-z_0-9]+)["']""", code))
    assert set(TEXTS) <= quoted, "a text that nobody says"
    said = set(re.findall(r"""(?:\bi18n|\btext|\bnote)\(\s*["'](\w+)""", code))
    assert said <= set(TEXTS)
    assert len(said) > 25


def test_a_browser_gets_the_same_keys_in_each_language():
    tables = translations()
    assert set(tables) == {"en", "zh", "zh-CN", "zh-TW"}
    assert {frozenset(table) for table in tables.values()} == {frozenset(TEXTS)}
    assert tables["en"]["clear"] != tables["zh-CN"]["clear"] == tables["zh"]["clear"]


def test_text_fills_the_holes_and_knows_english_only_beside_chinese():
    assert text("figure_images", "en", number=2) == "Image 2"
    assert text("figure_images", "zh", number=2) == "图片 2"
    assert text("figure_image", "de") == "The image"


def test_errors_are_said_in_the_language_where_they_are_known():
    busy = too_busy("3 requests are waiting")
    assert "busy" in error_text(busy, "en")
    assert CHINESE.search(error_text(busy, "zh"))
    unknown = ApiError(400, "the prompt is too long")
    assert error_text(unknown, "zh") == error_text(unknown, "en") == "the prompt is too long"


def test_what_is_our_fault_is_said_in_no_detail():
    ours = ApiError(500, "the stack")
    assert "stack" not in error_text(ours, "en") + error_text(ours, "zh")
