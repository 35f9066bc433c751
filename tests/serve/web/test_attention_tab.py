"""The tab "where it looked", on the tiny model; without a browser."""

import asyncio
import re

import pytest
from PIL import Image

from owl2.attention import heat_map
from owl2.serve.web.attention_tab import ALL, Looking, describe, paint, shares
from owl2.serve.web.conversation import Conversation, Turn


def image(shade, size=8):
    return Image.new("RGB", (size, size), (shade, 90, 200 - shade))


def talk(*turns):
    return Conversation(list(turns))


@pytest.fixture(scope="module")
def looked(tiny_engine):
    turns = talk(
        Turn("what?", ("/tmp/o'ne.png",), (image(10),), "a red circle"),
        Turn("and this?", ("/tmp/two.png",), (image(150),), "yes, blue"),
    )
    kept, words, shown = asyncio.run(Looking(tiny_engine).show(turns, None, "en"))
    return kept, words, shown


def test_the_last_answers_words_can_be_chosen(looked):
    _, words, shown = looked
    assert words["choices"] == [("the whole answer", ALL), ("yes", 0), ("blue", 1)]
    assert words["value"] == ALL
    assert words["visible"]
    assert shown.count("<figure>") == 4  # both turns' images, each painted too


def test_files_are_named_so_that_no_markup_breaks(looked):
    _, _, shown = looked
    assert "file=/tmp/o%27ne.png" in shown
    assert "o'ne" not in shown


@pytest.mark.parametrize("word", [ALL, 0, 1])
def test_shares_sum_to_one_and_are_shown(looked, word):
    kept, _, _ = looked
    tokens = (0, len(kept.looks.tokens)) if word == ALL else kept.words[word][1]
    sums = shares(kept.looks, tokens)
    assert len(sums["image"]) == 2
    assert sum(map(sum, sums.values())) == pytest.approx(1, abs=1e-5)
    shown = paint(kept, word, "en")
    for share in (*sums["image"], sum(sums["text"]), sum(sums["answer"])):
        assert f"width: {share:.2%}" in shown


def test_each_word_has_its_own_map(looked):
    kept, _, _ = looked
    images = [re.findall(r"src='(data:[^']+)'", paint(kept, word, "en")) for word in (0, 1)]
    assert images[0] != images[1]
    first, second = (heat_map(kept.looks, kept.words[word][1], 0) for word in (0, 1))
    assert abs(first - second).max() > 1e-6


@pytest.mark.parametrize("word", [None, -5, 99])
def test_a_word_that_is_not_there_is_all_of_them(looked, word):
    assert paint(looked[0], word, "en") == paint(looked[0], ALL, "en")


def test_little_is_kept(looked):
    looks = looked[0].looks
    assert looks.mean.shape[0] == 1
    assert looks.attention.size == 0


def test_another_language_says_all_anew(looked):
    words, shown = describe(looked[0], 1, "zh")
    assert words["choices"][0] == ("整个回答", ALL)
    assert words["value"] == 1
    assert "图片 2" in shown and "Image" not in shown


def test_the_same_answer_is_not_looked_at_twice(tiny_engine, monkeypatch):
    turns = talk(Turn("what?", ("1.png",), (image(10),), "a red circle"))
    looking = Looking(tiny_engine)

    async def twice():
        first, *_ = await looking.show(turns, None, "en")
        second, *_ = await looking.show(turns, first, "en")
        turns.turns[0].answer = "green"
        third, *_ = await looking.show(turns, second, "en")
        return first, second, third

    first, second, third = asyncio.run(twice())
    assert first is second
    assert [word for word, _ in third.words] == ["green"]


@pytest.mark.parametrize(
    ("turns", "busy", "said"),
    [
        ((), False, ""),
        ((Turn("what?", answer="red"),), False, "nothing to look at"),
        ((Turn("what?", ("1.png",), (image(1),), "red"),), True, "still being written"),
    ],
)
def test_nothing_to_look_at_shows_the_help(tiny_engine, capsys, turns, busy, said):
    given = talk(*turns)
    given.busy = busy
    kept, words, shown = asyncio.run(Looking(tiny_engine).show(given, None, "en"))
    assert kept is None
    assert not words["visible"]
    assert shown.startswith("Ask about an image first")
    out = capsys.readouterr().out
    assert said in out if said else not out


def test_what_goes_wrong_is_said(tiny_engine):
    broken = talk(Turn("what? " * 200, ("1.png",), (image(1),), "red"))  # beyond the context
    with pytest.warns(UserWarning, match="tokens"):
        kept, _, _ = asyncio.run(Looking(tiny_engine).show(broken, None, "en"))
    assert kept is None
