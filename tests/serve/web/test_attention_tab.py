"""The attention tab with the tiny model, without a browser."""

import asyncio
import re

import pytest
from PIL import Image

from owl2.attention import heat_map
from owl2.errors import ErrorCode, InputError
from owl2.serve.admission import current_client
from owl2.serve.web.attention_tab import ALL, AttentionTab, attention_shares, describe, render
from owl2.serve.web.conversation import Conversation, Turn


def image(shade, size=8):
    return Image.new("RGB", (size, size), (shade, 90, 200 - shade))


def conversation(*turns):
    return Conversation(list(turns))


async def load_images(conversation, language):
    files = [file for turn in conversation.turns for file in turn.files]
    return [image(10 + 140 * number) for number, _ in enumerate(files)]


@pytest.fixture(scope="module")
def shown_answer(tiny_engine):
    turns = conversation(
        Turn("what?", ("/tmp/o'ne.png",), answer="a red circle"),
        Turn("and this?", ("/tmp/two.png",), answer="yes, blue"),
    )
    kept, words, shown = asyncio.run(AttentionTab(tiny_engine, load_images).show(turns, None, "en"))
    return kept, words, shown


def test_the_words_of_the_last_answer_can_be_selected(shown_answer):
    _, words, shown = shown_answer
    assert words["choices"] == [("complete answer", ALL), ("yes", 0), ("blue", 1)]
    assert words["value"] == ALL
    assert words["visible"]
    assert shown.count("<figure>") == 4  # both turns' images, each painted too


def test_file_names_are_escaped(shown_answer):
    _, _, shown = shown_answer
    assert "file=/tmp/o%27ne.png" in shown
    assert "o'ne" not in shown


@pytest.mark.parametrize("word", [ALL, 0, 1])
def test_shares_sum_to_one_and_are_shown(shown_answer, word):
    kept, _, _ = shown_answer
    tokens = (0, len(kept.maps.tokens)) if word == ALL else kept.words[word][1]
    sums = attention_shares(kept.maps, tokens)
    assert len(sums["image"]) == 2
    assert sum(map(sum, sums.values())) == pytest.approx(1, abs=1e-5)
    shown = render(kept, word, "en")
    for share in (*sums["image"], sum(sums["text"]), sum(sums["answer"])):
        assert f"width: {share:.2%}" in shown


def test_each_word_has_another_map(shown_answer):
    kept, _, _ = shown_answer
    images = [re.findall(r"src='(data:[^']+)'", render(kept, word, "en")) for word in (0, 1)]
    assert images[0] != images[1]
    first, second = (heat_map(kept.maps, kept.words[word][1], 0) for word in (0, 1))
    assert abs(first - second).max() > 1e-6


@pytest.mark.parametrize("word", [None, -5, 99])
def test_an_unknown_word_shows_the_complete_answer(shown_answer, word):
    assert render(shown_answer[0], word, "en") == render(shown_answer[0], ALL, "en")


def test_only_the_mean_is_stored(shown_answer):
    maps = shown_answer[0].maps
    assert maps.mean.shape[0] == 1
    assert maps.attention.size == 0


def test_describe_in_another_language(shown_answer):
    words, shown = describe(shown_answer[0], 1, "zh")
    assert words["choices"][0] == ("整个回答", ALL)
    assert words["value"] == 1
    assert "图片 2" in shown and "Image" not in shown


def test_the_attention_of_an_answer_is_collected_once(tiny_engine, monkeypatch):
    turns = conversation(Turn("what?", ("1.png",), answer="a red circle"))
    tab = AttentionTab(tiny_engine, load_images)

    async def twice():
        first, *_ = await tab.show(turns, None, "en")
        second, *_ = await tab.show(turns, first, "en")
        turns.turns[0].answer = "green"
        third, *_ = await tab.show(turns, second, "en")
        return first, second, third

    first, second, third = asyncio.run(twice())
    assert first is second
    assert [word for word, _ in third.words] == ["green"]


def test_the_tab_waits_for_the_end_of_the_answer(tiny_engine):
    turns = conversation(Turn("what?", ("1.png",), answer="a red"))

    async def select_tab_before_the_end():
        async with turns.answering:
            tab = asyncio.create_task(
                AttentionTab(tiny_engine, load_images).show(turns, None, "en")
            )
            await asyncio.sleep(0)  # the tab has started
            turns.turns[-1].answer += " circle"
        return await tab

    kept, *_ = asyncio.run(select_tab_before_the_end())
    assert [word for word, _ in kept.words] == ["a", "red", "circle"]


def test_clients_take_turns(tiny_engine):
    order = []

    async def load(conversation, language):
        order.append(current_client.get())
        await asyncio.sleep(0)
        raise InputError("the file has expired", ErrorCode.FILE_NOT_FOUND)

    async def show(client):
        current_client.set(client)
        await tab.show(conversation(Turn("what?", ("1.png",), answer="red")), None, "en")

    async def show_all():
        await asyncio.gather(*map(show, "aaaaab"))

    tab = AttentionTab(tiny_engine, load)
    with pytest.warns(UserWarning, match="expired"):
        asyncio.run(show_all())
    assert sorted(order) == list("aaaaab")
    assert order.index("b") <= 2


@pytest.mark.parametrize(
    ("turns", "info"), [((), ""), ((Turn("what?", answer="red"),), "no image")]
)
def test_without_an_image_the_help_is_shown(tiny_engine, capsys, turns, info):
    kept, words, shown = asyncio.run(
        AttentionTab(tiny_engine, load_images).show(conversation(*turns), None, "en")
    )
    assert kept is None
    assert not words["visible"]
    assert shown.startswith("Ask about an image first")
    out = capsys.readouterr().out
    assert info in out if info else not out


def test_errors_are_shown(tiny_engine):
    broken = conversation(Turn("what? " * 200, ("1.png",), answer="red"))  # beyond the context
    with pytest.warns(UserWarning, match="tokens"):
        kept, _, _ = asyncio.run(AttentionTab(tiny_engine, load_images).show(broken, None, "en"))
    assert kept is None
