"""The event handlers of the chat, without a browser."""

import asyncio
import warnings
from contextlib import contextmanager

import pytest
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.serve.admission import AdmissionController
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.metrics import Metrics
from owl2.serve.web.chat_handler import ChatHandler
from owl2.serve.web.conversation import WAITING, Conversation
from owl2.serve.web.examples import Example
from tests.serve.running import FakeEngine

SETTINGS = ("en", 32, 0.0, 1.0, "")


class Visitor:
    """Asks questions and records what a browser would show.

    Attributes:
        conversation: In the server.
        box: The last value that the text box was set to.
    """

    def __init__(self, engine, decode=None, examples=(), **limits):
        self.engine = engine
        self.admission = AdmissionController(engine, ServerLimits(**limits), Metrics())
        self.handler = ChatHandler(self.admission, decode or self.opened, examples)
        self.conversation = Conversation()
        self.box = "untouched"
        self.chats = []

    async def opened(self, data):
        return Image.new("RGB", (8, 8), (data[0], 0, 0))

    def ask(self, question="what?", files=(), settings=SETTINGS):
        given = {"text": question, "files": [str(file) for file in files]}
        return self.begin(self.handler.ask(given, self.conversation, *settings))

    def begin(self, views):
        async def see():
            async for view in views:
                self.chats.append([row["content"] for row in view.rows])
                if "value" in view.box:
                    self.box = view.box["value"]

        return asyncio.ensure_future(see())

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    async def asked(self, count=1):
        await self.until(lambda: len(self.engine.asked) >= count)
        return self.engine.asked[count - 1]

    async def answered(self, *chunks, **given):
        """A question, answered."""
        count = len(self.engine.asked)
        task = self.ask(**given)
        request = await self.asked(count + 1)
        for chunk in chunks:
            request.say(chunk)
        request.end()
        await task
        return request


@pytest.fixture
def engine(tiny_engine):
    return FakeEngine(tiny_engine)


@pytest.fixture
def visit(engine):
    """A coroutine function of a `Visitor`, run."""

    def run(story, **settings):
        async def tell():
            visitor = Visitor(engine, **settings)
            await story(visitor)
            assert not visitor.conversation.answering.locked()
            assert visitor.admission.in_flight == 0
            return visitor

        return asyncio.run(tell())

    return run


@contextmanager
def shows_error(needle):
    """Outside of a page, gradio turns an error notification into a warning."""
    with pytest.warns(UserWarning, match=needle):
        yield


def test_the_answer_is_streamed(visit):
    async def story(visitor):
        task = visitor.ask("what is this?")
        request = await visitor.asked()
        assert visitor.chats == [["what is this?", WAITING]]
        assert visitor.box is None  # empty while it is answered
        request.say("a red")
        await visitor.until(lambda: visitor.chats[-1] == ["what is this?", "a red"])
        request.say(" circle")
        request.end()
        await task
        assert visitor.chats[-1] == ["what is this?", "a red circle"]

    visit(story)


def test_a_second_turn_includes_the_first_and_its_images(visit, tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(bytes([int(name[0])]))

    async def story(visitor):
        await visitor.answered("a cat", question="what?", files=sorted(tmp_path.iterdir()))
        request = await visitor.answered("black", question="which color?")
        first, answer, second = request.messages
        colors = [part["image"].getpixel((0, 0))[0] for part in first["content"][:-1]]
        assert colors == [1, 2]
        assert first["content"][-1] == {"type": "text", "text": "what?"}
        assert answer == {"role": "assistant", "content": "a cat"}
        assert second["content"] == [{"type": "text", "text": "which color?"}]
        assert visitor.conversation.display()[0]["content"] == {"path": str(tmp_path / "1.png")}

    visit(story)


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
def test_settings_reach_the_engine_within_the_limits(visit, settings, options):
    async def story(visitor):
        request = await visitor.answered("yes", settings=settings)
        assert request.options == options

    visit(story, max_completion_tokens=100)


def test_a_truncated_answer_has_a_note(visit):
    async def story(visitor):
        task = visitor.ask()
        request = await visitor.asked()
        request.say("a very")
        request.end("length")
        await task
        assert "truncated" in visitor.chats[-1][-1]
        assert (
            visitor.conversation.turns[-1].answer == "a very"
        )  # what the model sees next has no note

    visit(story)


def test_stop_keeps_the_partial_answer(visit):
    async def story(visitor):
        task = visitor.ask()
        request = await visitor.asked()
        request.say("a long")
        await visitor.until(lambda: visitor.chats[-1][-1] == "a long")
        await visitor.handler.stop(visitor.conversation)
        await task
        assert request.aborted
        assert visitor.chats[-1][-1].startswith("a long")
        assert "(stopped)" in visitor.chats[-1][-1]

    visit(story)


def test_stop_before_the_first_token_restores_the_question(visit):
    async def story(visitor):
        task = visitor.ask("what?")
        request = await visitor.asked()
        await visitor.handler.stop(visitor.conversation)
        await task
        assert request.aborted
        assert visitor.chats[-1] == []
        assert visitor.box == {"text": "what?", "files": []}

    visit(story)


def test_stop_removes_a_queued_request(visit):
    async def story(visitor):
        first = visitor.ask("first?")
        request = await visitor.asked()
        talk, visitor.conversation = visitor.conversation, Conversation()
        second = visitor.ask("second?")
        await visitor.until(lambda: visitor.admission.in_flight == 2)
        await visitor.handler.stop(visitor.conversation)
        await second
        request.say("one")
        request.end()
        await first
        assert len(visitor.engine.asked) == 1
        assert [turn.answer for turn in talk.turns] == ["one"]

    visit(story, max_num_seqs=1)


def test_a_disconnect_frees_the_slot(visit):
    async def story(visitor):
        views = visitor.handler.ask({"text": "what?", "files": []}, visitor.conversation, *SETTINGS)
        assert len((await anext(views)).rows) == 2
        waiting = asyncio.ensure_future(anext(views))
        request = await visitor.asked()
        request.say("a")
        await waiting
        await views.aclose()  # as gradio does when the browser is gone
        assert request.aborted

    visit(story)


def test_regenerate_replaces_the_answer(visit):
    async def story(visitor):
        await visitor.answered("one", question="what?")
        task = visitor.begin(visitor.handler.regenerate(visitor.conversation, *SETTINGS))
        request = await visitor.asked(2)
        assert len(request.messages) == 1
        request.say("two")
        request.end()
        await task
        assert visitor.chats[-1] == ["what?", "two"]

    visit(story)


def test_a_failed_regenerate_keeps_the_answer(visit):
    async def story(visitor):
        await visitor.answered("one", question="what?")
        task = visitor.begin(visitor.handler.regenerate(visitor.conversation, *SETTINGS))
        (await visitor.asked(2)).fail(InputError("too long", ErrorCode.TOO_LONG))
        with shows_error("too long"):
            await task
        assert visitor.chats[-1] == ["what?", "one"]

    visit(story)


def test_regenerate_needs_a_question(visit, capsys):
    async def story(visitor):
        await visitor.begin(visitor.handler.regenerate(visitor.conversation, *SETTINGS))

    visit(story)
    assert "Ask a question first." in capsys.readouterr().out


def test_clear_stops_the_answer(visit):
    async def story(visitor):
        task = visitor.ask("what?")
        request = await visitor.asked()
        view = await visitor.handler.clear(visitor.conversation)
        assert view.rows == []
        await task
        assert request.aborted
        assert visitor.chats[-1] == []
        assert visitor.box is None  # not the question of the old conversation

    visit(story)


def test_an_empty_answer_is_removed(visit, capsys):
    async def story(visitor):
        await visitor.answered(" ", question="what?")
        assert visitor.conversation.turns == []
        assert visitor.box == {"text": "what?", "files": []}

    visit(story)
    assert "empty answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        ({"question": " "}, SETTINGS, "Type a question first"),
        ({"question": " "}, ("zh", *SETTINGS[1:]), "请先输入问题"),
        ({}, (*SETTINGS[:4], "seven"), "The seed must be"),
        ({"files": ["a.png"] * 3}, SETTINGS, "3 images; the limit is 2"),
        ({"files": ["a.png"] * 3}, ("zh", *SETTINGS[1:]), "图片太多"),
        ({"question": "a" * (128 * 64 + 1)}, SETTINGS, "context of 128 tokens"),
        ({"question": "a" * (128 * 64 + 1)}, ("zh", *SETTINGS[1:]), "文字太长"),
        ({"files": ["gone.png"]}, SETTINGS, "“gone.png” has expired"),
    ],
)
def test_an_invalid_question_stays_in_the_box(visit, given, settings, words):
    async def story(visitor):
        with shows_error(words):
            await visitor.ask(**given, settings=settings)
        assert visitor.box == {
            "text": given.get("question", "what?"),
            "files": given.get("files", []),
        }
        assert visitor.conversation.turns == []
        assert visitor.engine.asked == []

    visit(story, max_images=2)


@pytest.mark.parametrize(("language", "words"), [("en", "it is broken"), ("zh", "文件已损坏")])
def test_a_broken_image_is_named(visit, tmp_path, language, words):
    (tmp_path / "cat.png").write_bytes(b"x")

    async def decode(data):
        raise ApiError(400, "it is broken", code="invalid_image")

    async def story(visitor):
        with shows_error(f"cat.png.*{words}"):
            await visitor.ask(files=[tmp_path / "cat.png"], settings=(language, *SETTINGS[1:]))
        assert visitor.box["files"] == [str(tmp_path / "cat.png")]
        assert visitor.conversation.turns == []
        await visitor.answered("fine", question="and without it?")

    visit(story, decode=decode)


def test_images_of_all_turns_count(visit, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")

    async def story(visitor):
        await visitor.answered("a", files=[tmp_path / "cat.png"])
        with shows_error("2 images; the limit is 1"):
            await visitor.ask(files=[tmp_path / "cat.png"])

    visit(story, max_images=1)


def test_a_full_queue_rejects(visit):
    async def story(visitor):
        first = visitor.ask("first?")
        request = await visitor.asked()
        visitor.conversation = Conversation()
        with shows_error("busy"):
            await visitor.ask("second?")
        request.say("one")
        request.end()
        await first

    visit(story, max_num_seqs=1, max_queued=0)


def test_a_timeout_keeps_the_partial_answer(visit):
    async def story(visitor):
        task = visitor.ask()
        request = await visitor.asked()
        request.say("slowly")
        with shows_error("0.2 seconds"):
            await task
        assert request.aborted
        assert visitor.chats[-1][-1] == "slowly"

    visit(story, request_timeout=0.2)


def test_an_unexpected_error_is_logged_and_not_shown(visit, caplog):
    async def story(visitor):
        task = visitor.ask()
        (await visitor.asked()).fail(RuntimeError("internal detail"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            await task
        assert "server log" in str(said[0].message)
        assert "internal detail" not in str(said[0].message)

    visit(story)
    assert "internal detail" in caplog.text


def test_an_example_is_selected_by_index(visit, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")
    examples = [Example("no", ()), Example("is it a cat?", (tmp_path / "cat.png",))]

    class Event:
        index = 1
        value = {"text": "read this", "files": ["/etc/passwd"]}  # what a browser might send

    async def story(visitor):
        task = visitor.begin(visitor.handler.ask_example(Event(), visitor.conversation, *SETTINGS))
        request = await visitor.asked()
        request.say("yes")
        request.end()
        await task
        assert visitor.conversation.turns[0].question == "is it a cat?"
        assert visitor.conversation.turns[0].files == (str(tmp_path / "cat.png"),)

    visit(story, examples=examples)


def test_a_busy_conversation_ignores_questions(visit):
    async def story(visitor):
        task = visitor.ask("first?")
        request = await visitor.asked()
        await visitor.ask("second?")
        assert len(visitor.engine.asked) == 1
        request.say("one")
        request.end()
        await task
        assert [turn.question for turn in visitor.conversation.turns] == ["first?"]

    visit(story)
