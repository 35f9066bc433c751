"""Conversations: their display, editing, and their copy in the browser."""

import re
from html import unescape

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.serve.web.conversation import Conversation, Turn, plain_text
from tests.errors import raises_input_error
from tests.serve.web.visitor import shows_error

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "question",
    [
        "*red* or _blue_? # 1. - > `x` | ~~y~~",
        "    code\n\n<b>bold</b>\t&amp; &#65; $x^2$ \\(y\\)",
        "www.example.com https://example.com a@example.com ![x](y)",
        " two  spaces ",
        "1. 什么？\r\n<|image|>",
    ],
)
def test_question_is_text_without_markup(question):
    shown = plain_text(question)
    assert unescape(shown) == question
    assert not re.search(r"[^\w\s&#;？]", shown)
    assert "\n" not in shown and not shown.startswith(" ")


def test_display_escapes_the_question_and_omits_an_empty_one():
    turns = [Turn("a *b*", ("1.png", "2.png"), answer="*c*"), Turn("", ("3.png",), answer="d")]
    assert [row["content"] for row in Conversation(turns).display()] == [
        {"path": "1.png"},
        {"path": "2.png"},
        "a &#0000042;b&#0000042;",
        "*c*",
        {"path": "3.png"},
        "d",
    ]


def test_conversation_is_restored_from_the_browser():
    turns = [
        Turn("a?", ("1.png",), answer="b", note="(stopped)"),
        Turn("c?", answer="d"),
        Turn("unanswered?"),
    ]
    memory = Conversation(turns).save()
    restored = Conversation()
    restored.restore(memory)
    assert restored.turns == turns[:2]
    restored.restore([])
    restored.restore(memory * 2)  # the server knows the conversation
    assert restored.turns == turns[:2]
    with raises_input_error(ErrorCode.INVALID_FORMAT):
        Conversation().restore([{"question": "a?"}])


async def test_question_after_a_restart_of_the_server(new_visitor, tmp_path):
    (tmp_path / "1.png").write_bytes(b"\x07")
    visitor = new_visitor()
    await visitor.answered("a cat", question="what?", files=[tmp_path / "1.png"])
    visitor.conversation = Conversation()  # of the new server
    request = await visitor.answered("black", question="which color?")
    image, question = request.messages[0]["content"]
    assert image["image"].getpixel((0, 0)) == (7, 0, 0)
    assert question["text"] == "what?"
    assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]
    assert visitor.chats[-1][1:] == ["what?", "a cat", "which color?", "black"]


async def edit(visitor):
    visitor.see(await visitor.handler.edit(visitor.conversation, visitor.memory, "en"))


async def test_edited_question_replaces_the_last_turn(new_visitor, tmp_path):
    (tmp_path / "1.png").write_bytes(b"\x07")
    visitor = new_visitor()
    await visitor.answered("one", question="first?")
    await visitor.answered("two", question="secnd?", files=[tmp_path / "1.png"])
    await edit(visitor)
    assert visitor.box == {"text": "secnd?", "files": [str(tmp_path / "1.png")]}
    assert "Edit question" in visitor.chats[-1][-1]
    request = await visitor.answered("three", question="second?")
    assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]
    assert visitor.chats[-1] == ["first?", "one", "second?", "three"]


async def test_cancelled_edit_keeps_the_turn(new_visitor):
    visitor = new_visitor()
    await visitor.answered("one", question="first?")
    await edit(visitor)
    await edit(visitor)
    assert visitor.box is None
    await visitor.answered("two", question="second?")
    assert visitor.chats[-1] == ["first?", "one", "second?", "two"]


@pytest.mark.parametrize("question", ["", "fails?"])
async def test_edited_question_without_an_answer_keeps_the_turn(new_visitor, question):
    visitor = new_visitor()
    await visitor.answered("one", question="first?")
    await edit(visitor)
    task = visitor.ask(question)
    if question:
        (await visitor.submitted(2)).fail(InputError("too long", ErrorCode.TOO_LONG))
    with shows_error("too long" if question else "Type a question"):
        await task
    assert [turn.answer for turn in visitor.conversation.turns] == ["one"]
    assert visitor.box == {"text": question, "files": []}


async def test_edit_needs_a_question(new_visitor, capsys):
    await edit(new_visitor())
    assert "Ask a question first." in capsys.readouterr().out


@pytest.mark.parametrize("chunks", [(), ("a part",)])
async def test_recovery_during_an_answer(new_visitor, chunks):
    """The answer ends; without a token, its question returns to the text box."""
    visitor = new_visitor()
    await visitor.answered("one", question="first?")
    task = visitor.ask("second?")
    request = await visitor.submitted(2)
    for chunk in chunks:
        request.emit(chunk)
        await visitor.until(lambda: visitor.chats[-1][-1] == "a part")
    visitor.box = "untouched"
    box = {"text": "second?", "files": []}
    visitor.see(await visitor.handler.recover(box, visitor.conversation, visitor.memory))
    await task
    assert request.aborted
    assert [turn.answer for turn in visitor.conversation.turns] == ["one", *chunks]
    assert visitor.box == ("untouched" if chunks else box)


async def test_recovery_after_a_restart(new_visitor):
    visitor = new_visitor()
    await visitor.answered("one", question="first?")
    visitor.conversation = Conversation()
    box = {"text": "second?", "files": []}
    visitor.see(await visitor.handler.recover(box, visitor.conversation, visitor.memory))
    assert visitor.chats[-1] == ["first?", "one"]
    assert visitor.box == box
    visitor.box = "untouched"
    visitor.see(await visitor.handler.recover(None, visitor.conversation, visitor.memory))
    assert visitor.box == "untouched"


def test_the_copy_has_the_files():
    turn = Turn("a?", ("1.png",), answer="b")
    assert Conversation([turn]).save() == [
        {"question": "a?", "files": [{"path": "1.png"}], "answer": "b", "note": ""}
    ]
