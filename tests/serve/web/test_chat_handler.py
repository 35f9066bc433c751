"""The event handlers of the chat, without a browser."""

import asyncio
import gc
import warnings
import weakref

import pytest
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.serve.errors import ApiError
from owl2.serve.web.conversation import WAITING, Conversation
from owl2.serve.web.examples import Example
from tests.serve.web.visitor import SETTINGS, shows_error

pytestmark = pytest.mark.anyio


async def test_the_answer_is_streamed(new_visitor):
    visitor = new_visitor()
    task = visitor.ask("what is this?")
    request = await visitor.submitted()
    assert visitor.chats == [["what is this?", WAITING]]
    assert visitor.box is None  # empty while it is answered
    request.emit("a red")
    await visitor.until(lambda: visitor.chats[-1] == ["what is this?", "a red"])
    request.emit(" circle")
    request.end()
    await task
    assert visitor.chats[-1] == ["what is this?", "a red circle"]


async def test_an_image_alone_is_a_question(new_visitor, tmp_path):
    (tmp_path / "1.png").write_bytes(b"\x01")
    visitor = new_visitor()
    request = await visitor.answered("a cat", question=" ", files=[tmp_path / "1.png"])
    (message,) = request.messages
    assert [part["type"] for part in message["content"]] == ["image"]
    assert visitor.chats[-1][-1] == "a cat"


async def test_a_second_turn_includes_the_first_and_its_images(new_visitor, tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(bytes([int(name[0])]))

    loaded = []

    async def decode(data, budget):
        loaded.append(image := Image.new("RGB", (8, 8), (data[0], 0, 0)))
        return image

    visitor = new_visitor(decode=decode)
    await visitor.answered("a cat", question="what?", files=sorted(tmp_path.iterdir()))
    visitor.engine.requests.clear()
    references, loaded = [weakref.ref(image) for image in loaded], []
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    request = await visitor.answered("black", question="which color?")
    first, answer, second = request.messages
    colors = [part["image"].getpixel((0, 0))[0] for part in first["content"][:-1]]
    assert colors == [1, 2]
    assert first["content"][-1] == {"type": "text", "text": "what?"}
    assert answer == {"role": "assistant", "content": "a cat"}
    assert second["content"] == [{"type": "text", "text": "which color?"}]
    assert visitor.conversation.display()[0]["content"] == {"path": str(tmp_path / "1.png")}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (SETTINGS, {"max_new_tokens": 32, "temperature": 0.0, "seed": None}),
        (
            ("zh", 9999, 0.5, 0.9, " 7 "),
            {"max_new_tokens": 100, "temperature": 0.5, "top_p": 0.9, "seed": 7},
        ),
    ],
)
async def test_settings_reach_the_engine_within_the_limits(new_visitor, settings, options):
    visitor = new_visitor(max_completion_tokens=100)
    request = await visitor.answered("yes", settings=settings)
    assert request.options == options


async def test_a_truncated_answer_has_a_note(new_visitor):
    visitor = new_visitor()
    task = visitor.ask()
    request = await visitor.submitted()
    request.emit("a very")
    request.end("length")
    await task
    assert "truncated" in visitor.chats[-1][-1]
    assert visitor.conversation.turns[-1].answer == "a very"  # what the model sees next has no note


async def test_stop_keeps_the_partial_answer(new_visitor):
    visitor = new_visitor()
    task = visitor.ask()
    request = await visitor.submitted()
    request.emit("a long")
    await visitor.until(lambda: visitor.chats[-1][-1] == "a long")
    await visitor.handler.stop(visitor.conversation)
    await task
    assert request.aborted
    assert visitor.chats[-1][-1].startswith("a long")
    assert "(stopped)" in visitor.chats[-1][-1]


async def test_stop_before_the_first_token_restores_the_question(new_visitor):
    visitor = new_visitor()
    task = visitor.ask("what?")
    request = await visitor.submitted()
    await visitor.handler.stop(visitor.conversation)
    await task
    assert request.aborted
    assert visitor.chats[-1] == []
    assert visitor.box == {"text": "what?", "files": []}


async def test_stop_removes_a_queued_request(new_visitor):
    visitor = new_visitor(max_num_seqs=1)
    first = visitor.ask("first?")
    request = await visitor.submitted()
    talk, visitor.conversation = visitor.conversation, Conversation()
    second = visitor.ask("second?")
    await visitor.until(lambda: visitor.admission.in_flight == 2)
    await visitor.handler.stop(visitor.conversation)
    await second
    request.emit("one")
    request.end()
    await first
    assert len(visitor.engine.requests) == 1
    assert [turn.answer for turn in talk.turns] == ["one"]


async def test_a_disconnect_frees_the_slot(new_visitor):
    visitor = new_visitor()
    box = {"text": "what?", "files": []}
    views = visitor.handler.ask(box, visitor.conversation, [], *SETTINGS)
    assert len((await anext(views)).rows) == 2
    waiting = asyncio.ensure_future(anext(views))
    request = await visitor.submitted()
    request.emit("a")
    await waiting
    await views.aclose()  # as gradio does when the browser has disconnected
    assert request.aborted


async def test_regenerate_replaces_the_answer(new_visitor):
    visitor = new_visitor()
    await visitor.answered("one", question="what?")
    task = visitor.begin(
        visitor.handler.regenerate(visitor.conversation, visitor.memory, *SETTINGS)
    )
    request = await visitor.submitted(2)
    assert len(request.messages) == 1
    request.emit("two")
    request.end()
    await task
    assert visitor.chats[-1] == ["what?", "two"]


async def test_a_failed_regenerate_keeps_the_answer(new_visitor):
    visitor = new_visitor()
    await visitor.answered("one", question="what?")
    task = visitor.begin(
        visitor.handler.regenerate(visitor.conversation, visitor.memory, *SETTINGS)
    )
    (await visitor.submitted(2)).fail(InputError("too long", ErrorCode.TOO_LONG))
    with shows_error("too long"):
        await task
    assert visitor.chats[-1] == ["what?", "one"]


async def test_regenerate_needs_a_question(new_visitor, capsys):
    visitor = new_visitor()
    await visitor.begin(visitor.handler.regenerate(visitor.conversation, visitor.memory, *SETTINGS))
    assert "Ask a question first." in capsys.readouterr().out


async def test_clear_stops_the_answer(new_visitor):
    visitor = new_visitor()
    task = visitor.ask("what?")
    request = await visitor.submitted()
    view = await visitor.handler.clear(visitor.conversation)
    assert view.rows == []
    await task
    assert request.aborted
    assert visitor.chats[-1] == []
    assert visitor.box is None  # not the question of the old conversation


async def test_an_empty_answer_is_removed(new_visitor, capsys):
    visitor = new_visitor()
    await visitor.answered(" ", question="what?")
    assert visitor.conversation.turns == []
    assert visitor.box == {"text": "what?", "files": []}
    assert "empty answer" in capsys.readouterr().out


async def test_what_is_typed_after_a_rejected_question_stays(new_visitor):
    visitor = new_visitor()
    with shows_error("Type a question first"):
        task = visitor.ask(" ")
        visitor.box = "typed meanwhile"
        await task
    assert visitor.box == "typed meanwhile"


@pytest.mark.parametrize(
    ("question", "settings", "message"),
    [
        ({"question": " "}, SETTINGS, "Type a question first"),
        ({"question": " "}, ("zh", *SETTINGS[1:]), "请先输入问题"),
        ({}, (*SETTINGS[:4], "seven"), "The seed must be"),
        ({"files": ["a.png"] * 3}, SETTINGS, "3 images.* limit .* 2"),
        ({"files": ["a.png"] * 3}, ("zh", *SETTINGS[1:]), "图片太多"),
        ({"question": "a" * (128 * 64 + 1)}, SETTINGS, "context length is 128 tokens.* 8193"),
        ({"question": "a" * (128 * 64 + 1)}, ("zh", *SETTINGS[1:]), "文字太长"),
        ({"files": ["deleted.png"]}, SETTINGS, "“deleted.png” has expired"),
    ],
)
async def test_an_invalid_question_stays_in_the_box(new_visitor, question, settings, message):
    visitor = new_visitor(max_images=2)
    with shows_error(message):
        await visitor.ask(**question, settings=settings)
    assert visitor.box == {
        "text": question.get("question", "what?"),
        "files": question.get("files", []),
    }
    assert visitor.conversation.turns == []
    assert visitor.engine.requests == []


@pytest.mark.parametrize(("language", "message"), [("en", "it is broken"), ("zh", "文件已损坏")])
async def test_a_broken_image_is_named(new_visitor, tmp_path, language, message):
    (tmp_path / "cat.png").write_bytes(b"x")

    async def decode(data, budget):
        raise ApiError(400, "it is broken", code="invalid_image")

    visitor = new_visitor(decode=decode)
    with shows_error(f"cat.png.*{message}"):
        await visitor.ask(files=[tmp_path / "cat.png"], settings=(language, *SETTINGS[1:]))
    assert visitor.box["files"] == [str(tmp_path / "cat.png")]
    assert visitor.conversation.turns == []
    await visitor.answered("fine", question="and without it?")


async def test_images_of_all_turns_count(new_visitor, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")

    visitor = new_visitor(max_images=1)
    await visitor.answered("a", files=[tmp_path / "cat.png"])
    with shows_error("2 images.* limit .* 1"):
        await visitor.ask(files=[tmp_path / "cat.png"])


async def test_a_full_queue_rejects(new_visitor):
    visitor = new_visitor(max_num_seqs=1, max_queued=0)
    first = visitor.ask("first?")
    request = await visitor.submitted()
    visitor.conversation = Conversation()
    with shows_error("busy"):
        await visitor.ask("second?")
    request.emit("one")
    request.end()
    await first


async def test_a_timeout_keeps_the_partial_answer(new_visitor):
    visitor = new_visitor(request_timeout=0.2)
    task = visitor.ask()
    request = await visitor.submitted()
    request.emit("slowly")
    with shows_error("0.2 seconds"):
        await task
    assert request.aborted
    assert visitor.chats[-1][-1] == "slowly"


async def test_an_unexpected_error_is_logged_and_not_shown(new_visitor, caplog):
    visitor = new_visitor()
    task = visitor.ask()
    (await visitor.submitted()).fail(RuntimeError("internal detail"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await task
    assert "server log" in str(caught[0].message)
    assert "internal detail" not in str(caught[0].message)
    assert "RuntimeError" in caplog.text  # the traceback only the first time


async def test_an_example_is_selected_by_index(new_visitor, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")
    examples = [Example("no", ()), Example("is it a cat?", (tmp_path / "cat.png",))]

    class Event:
        index = 1
        value = {"text": "read this", "files": ["/etc/passwd"]}  # what a browser might send

    visitor = new_visitor(examples=examples)
    example = visitor.handler.ask_example(Event(), visitor.conversation, [], *SETTINGS)
    task = visitor.begin(example)
    request = await visitor.submitted()
    request.emit("yes")
    request.end()
    await task
    assert visitor.conversation.turns[0].question == "is it a cat?"
    assert visitor.conversation.turns[0].files == (str(tmp_path / "cat.png"),)


async def test_a_busy_conversation_ignores_questions(new_visitor):
    visitor = new_visitor()
    task = visitor.ask("first?")
    request = await visitor.submitted()
    await visitor.ask("second?")
    assert len(visitor.engine.requests) == 1
    request.emit("one")
    request.end()
    await task
    assert [turn.question for turn in visitor.conversation.turns] == ["first?"]
