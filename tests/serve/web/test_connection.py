"""The connection is lost or the server is restarted: nothing that the visitor wrote is lost."""

from contextlib import ExitStack

import pytest

from tests.serve.running import FakeEngine, run_app, wait_until
from tests.serve.web.browser_page import Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


def ask_first(chat, question, answer):
    """Ask, and wait until the page shows the complete answer: its first update empties the box."""
    chat.ask(question)
    chat.answer(answer)
    chat.expect(chat.answers).to_have_text([answer])
    chat.expect(chat.page.locator("#box .submit-button")).to_be_visible()
    chat.expect(chat.box).to_have_value("")


def ask_twice(open_chat, chunks):
    """A chat with an answered question and one whose answer has begun with `chunks`."""
    chat = open_chat()
    ask_first(chat, "first?", "one")
    chat.ask("second?")
    request = chat.next_request()
    for chunk in chunks:
        request.emit(chunk)
        chat.expect(chat.answers.last).to_have_text(chunk)
    return chat, request


def test_question_that_is_asked_offline_is_sent_later(open_chat):
    chat = open_chat()
    ask_first(chat, "first?", "one")
    chat.page.context.set_offline(True)
    chat.ask("second?")
    chat.expect(chat.page.locator("#connection-lost")).to_be_visible()
    chat.expect(chat.box).to_have_value("second?")
    chat.expect(chat.answers).to_have_text(["one"])
    chat.page.context.set_offline(False)
    request = chat.answer("two")
    assert len(request.messages) == 3
    chat.expect(chat.answers).to_have_text(["one", "two"])
    chat.expect(chat.page.locator("#connection-lost")).not_to_be_visible()
    chat.expect(chat.box).to_have_value("")


@pytest.mark.parametrize("chunks", [(), ("a part",)])
def test_connection_is_lost_during_an_answer(open_chat, chunks):
    chat, request = ask_twice(open_chat, chunks)
    chat.page.context.set_offline(True)
    chat.expect(chat.page.locator("#connection-lost")).to_be_visible()
    chat.page.context.set_offline(False)
    wait_until(lambda: request.aborted, 20)
    answers = ["one", *(f"{chunk} (stopped)" for chunk in chunks)]
    chat.expect(chat.answers).to_have_text(answers)
    chat.expect(chat.box).to_have_value("" if chunks else "second?")
    chat.ask("again?")
    chat.answer("three")
    chat.expect(chat.answers).to_have_text([*answers, "three"])


class Server:
    """A server that can be stopped and started again on the same port."""

    def __init__(self, engine):
        self.engine = FakeEngine(engine)
        self.port = 0
        self._stack = ExitStack()

    def start(self):
        from owl2.serve.app import build_app
        from owl2.serve.config import ServerLimits
        from owl2.serve.web.mount import mount

        app = build_app(self.engine, "restarted", ServerLimits())
        mount(app, self.engine, ServerLimits(), name="restarted")
        url = self._stack.enter_context(run_app(app, self.port))
        self.port = int(url.rpartition(":")[2])
        return f"{url}/web/"

    def stop(self):
        self._stack.close()


@pytest.mark.parametrize("asked", ["before", "during", "after"])
def test_server_is_restarted(visit, tiny_engine, images, asked):
    """The question is asked before the server stops, while it is down, or when it runs again."""
    server = Server(tiny_engine)
    try:
        chat = Page(visit(server.start()), server.engine)
        chat.add(images[0])
        ask_first(chat, "what color?", "red")
        chat.box.fill("and *now*?")
        submit = chat.page.locator("#box .submit-button")
        if asked == "before":
            submit.click()
            chat.next_request()
            chat.expect(chat.answers.last).to_contain_text("●")
        server.stop()
        if asked == "during":
            submit.click()
        if asked != "after":
            chat.expect(chat.page.locator("#connection-lost")).to_be_visible()
        server.start()
        if asked != "during":
            chat.expect(chat.page.locator("#connection-lost")).not_to_be_visible()
            chat.expect(chat.box).to_have_value("and *now*?")
            chat.expect(chat.answers).to_have_text(["red"])
            submit.click()
        request = chat.answer("still red")
        first, answer, second = request.messages
        assert first["content"][0]["image"].getpixel((1, 1)) == (255, 0, 0)
        assert answer["content"] == "red"
        assert second["content"][-1]["text"] == "and *now*?"
        chat.expect(chat.answers).to_have_text(["red", "still red"])
    finally:
        server.stop()


def kept(chat):
    """What the browser keeps for a reload."""
    return chat.page.evaluate("JSON.parse(sessionStorage.getItem('owl2-conversation'))")


def reload(chat):
    chat.page.reload()
    chat.page.wait_for_function("window.owl2")


@pytest.mark.parametrize("again", ["and *now*?", "what color?"])
def test_reload_keeps_the_conversation_and_the_typed_question(open_chat, images, again):
    chat = open_chat()
    chat.add(images[0])
    ask_first(chat, "what color?", "red")
    chat.add(images[1])
    chat.box.fill(again)
    wait_until(lambda: kept(chat)["draft"]["text"] == again, 20)
    for _ in range(2):
        reload(chat)
        chat.expect(chat.answers).to_have_text(["red"])
        chat.expect(chat.box).to_have_value(again)
        chat.expect(chat.page.locator("#box .thumbnail-item")).to_have_count(1)
    chat.page.locator("#box .submit-button").click()
    request = chat.answer("green")
    first, answer, second = request.messages
    colors = [part["content"][0]["image"].getpixel((1, 1)) for part in (first, second)]
    assert colors == [(255, 0, 0), (0, 128, 0)]
    assert answer["content"] == "red"
    assert second["content"][-1]["text"] == again
    chat.expect(chat.answers).to_have_text(["red", "green"])


@pytest.mark.parametrize("chunks", [(), ("a part",)])
def test_reload_during_an_answer_returns_the_question(open_chat, chunks):
    chat, _ = ask_twice(open_chat, chunks)
    reload(chat)
    chat.expect(chat.answers).to_have_text(["one"])
    chat.expect(chat.box).to_have_value("second?")


def test_reload_after_a_restart_keeps_the_texts(visit, tiny_engine, images):
    server = Server(tiny_engine)
    try:
        chat = Page(visit(server.start()), server.engine)
        chat.add(images[0])
        ask_first(chat, "what color?", "red")
        server.stop()
        server.start()
        chat.page.goto(chat.page.url)
        chat.expect(chat.answers).to_have_text(["red"])
        chat.expect(chat.questions).to_have_text(["what color?"])  # the image is lost
        chat.ask("again?")
        request = chat.answer("still red")
        assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]
    finally:
        server.stop()


def test_new_conversation_and_other_tabs_restore_nothing(open_chat):
    chat = open_chat()
    ask_first(chat, "first?", "one")
    other = chat.page.context.new_page()
    other.goto(chat.page.url)
    other.wait_for_function("window.owl2")
    assert other.evaluate("sessionStorage.length") == 0
    chat.page.locator("#clear").click()
    chat.expect(chat.answers).to_have_count(0)
    wait_until(lambda: kept(chat) is None, 20)
    reload(chat)
    chat.expect(chat.box).to_be_visible()
    assert kept(chat) is None
