"""The page in a browser."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.serve.running import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

PAGE = re.compile(r"page is at (http://\S+)")
LEFT = {"examples.json", "temporary", "log", "red.png", "green.png", "blue.png"}
PHONE = {"viewport": {"width": 375, "height": 700}, "has_touch": True, "is_mobile": True}


class Page:
    """Actions and locators of a page."""

    def __init__(self, page, engine=None):
        from playwright.sync_api import expect

        self.page, self.engine, self.expect = page, engine, expect
        self.seen = 0 if engine is None else len(engine.asked)
        self.box = page.locator("#box textarea")
        self.answers = page.get_by_test_id("bot")
        self.questions = page.get_by_test_id("user")
        self.corner = page.get_by_test_id("toast-body")

    def add(self, *files):
        before = self.page.locator("#box .thumbnail-item").count()
        self.page.set_input_files("#box input[type=file]", files)
        self.expect(self.page.locator("#box .thumbnail-item")).to_have_count(before + len(files))
        self.expect(self.page.locator("#box .loader")).to_have_count(0)

    def ask(self, question):
        self.box.fill(question)
        self.page.locator("#box .submit-button").click()

    def told(self):
        """The next question at the engine."""
        self.seen += 1
        wait_until(lambda: len(self.engine.asked) >= self.seen, 20)
        return self.engine.asked[self.seen - 1]

    def answer(self, *words):
        told = self.told()
        for word in words:
            told.say(word)
        told.end()
        self.expect(self.page.locator("#box .submit-button")).to_be_visible()
        return told

    def tab(self, number):
        self.page.get_by_role("tab").nth(number).click()


@pytest.fixture
def person(visit, told):
    url, engine = told

    def come(**settings):
        return Page(visit(url, **settings), engine)

    return come


def test_upload_ask_stream_and_follow_up(person, images):
    me = person()
    me.add(*images[:2])
    me.ask("which colors?")
    told = me.told()
    parts = told.messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]
    assert [part["image"].getpixel((2, 2)) for part in parts[:2]] == [(255, 0, 0), (0, 128, 0)]
    me.expect(me.answers.last).to_contain_text("●")  # waiting for the first token
    told.say("red")
    me.expect(me.answers.last).to_have_text("red")
    assert me.page.locator("#box .stop-button").is_visible()
    told.say(" and green")
    told.end()
    me.expect(me.answers.last).to_have_text("red and green")
    me.expect(me.page.locator("#chat img[src*=gradio_api]")).to_have_count(2)
    me.expect(me.box).to_have_value("")

    me.box.fill("sure?")
    me.box.press("Enter")
    second = me.answer("yes")
    assert [message["role"] for message in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1]["content"] == "red and green"
    me.expect(me.answers).to_have_count(2)
    me.expect(me.answers.last).to_have_text("yes")


def test_a_broken_file_is_named_and_the_question_stays(person, images):
    me = person()
    broken = images[0].parent / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:50])
    me.add(broken)
    me.ask("what is it?")
    me.expect(me.corner).to_contain_text("broken.png")
    me.expect(me.box).to_have_value("what is it?")
    me.expect(me.answers).to_have_count(0)
    me.page.locator("#box .thumbnail-item .delete-button").click()
    me.add(images[0])
    me.page.locator("#box .submit-button").click()
    me.answer("red")
    me.expect(me.answers.last).to_have_text("red")


def test_a_file_that_is_too_large_is_rejected(person, tmp_path):
    me = person()
    (tmp_path / "large.png").write_bytes(b"x" * 60_000)
    me.page.set_input_files("#box input[type=file]", tmp_path / "large.png")
    me.expect(me.corner).to_be_visible()
    me.ask("what?")
    assert me.answer("nothing").messages[0]["content"] == [{"type": "text", "text": "what?"}]


def test_an_image_can_be_dropped_anywhere(person, images):
    me = person()
    data = me.page.evaluate_handle(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "red.png", { type: "image/png" }));
            return data;
        }""",
        list(images[0].read_bytes()),
    )
    me.page.dispatch_event("#chat", "drop", {"dataTransfer": data})
    me.expect(me.page.locator("#box .thumbnail-item")).to_have_count(1)
    me.ask("what color?")
    assert me.answer("red").messages[0]["content"][0]["image"].getpixel((1, 1)) == (255, 0, 0)


def test_stop_regenerate_and_clear(person):
    me = person()
    me.ask("count!")
    told = me.told()
    told.say("one two")
    me.expect(me.answers.last).to_have_text("one two")
    me.page.locator("#box .stop-button").click()
    me.expect(me.answers.last).to_contain_text("(stopped)")
    assert told.aborted
    me.expect(me.page.locator("#box .submit-button")).to_be_visible()

    me.page.click("#regenerate")
    me.answer("one two three")
    me.expect(me.answers).to_have_count(1)
    me.expect(me.answers.last).to_have_text("one two three")

    me.page.click("#clear")
    me.expect(me.answers).to_have_count(0)
    me.expect(me.page.locator("#chat .example")).to_have_count(3)
    me.ask("and now?")
    assert len(me.answer("new").messages) == 1


def test_copy_an_answer(person):
    me = person(permissions=["clipboard-read", "clipboard-write"])
    me.ask("what?")
    me.answer("a *red* circle")
    me.page.get_by_role("button", name="Copy message").last.click()
    me.page.wait_for_function("navigator.clipboard.readText().then((text) => text)")
    assert me.page.evaluate("navigator.clipboard.readText()") == "a *red* circle"


def test_a_click_on_an_example_asks_it(person):
    me = person()
    cards = me.page.locator("#chat .example")
    me.expect(cards).to_have_count(3)
    shown = "image => image.complete && image.naturalWidth > 0"
    assert all(cards.nth(number).locator("img").evaluate(shown) for number in range(3))
    cards.nth(2).click()
    told = me.answer("yes")
    assert told.messages[0]["content"][1]["text"] == "is there a blue shape?"
    me.expect(me.answers.last).to_have_text("yes")


def test_settings_reach_the_engine(person):
    me = person()
    me.tab(2)
    for label, value in (("Maximum length", "9"), ("Temperature", "0.5"), ("Top p", "0.9")):
        number = me.page.get_by_label(f"number input for {label}")
        number.fill(value)
        number.blur()
    me.page.get_by_label("Seed").fill("5")
    me.tab(0)
    me.ask("what?")
    told = me.answer("this")
    assert told.options == {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 5}


def test_closing_the_page_frees_the_slot(person):
    me = person()
    me.ask("what?")
    told = me.told()
    told.say("this")
    me.expect(me.answers.last).to_have_text("this")
    me.page.close()

    def left():
        told.say(" and")  # gradio notices the disconnect at the next update
        return told.aborted

    wait_until(left, 20)


def test_language_of_the_browser_and_language_switch(person):
    me = person(locale="zh-CN")
    me.expect(me.page.locator("#chat")).to_contain_text("就图片提问")
    me.expect(me.page.locator("#clear")).to_contain_text("新对话")
    me.ask(" ")
    me.expect(me.corner).to_contain_text("请先输入问题")
    me.ask("这是什么？")
    me.answer("一只猫头鹰")

    me.page.locator("#language").get_by_text("English").click()
    me.expect(me.page.locator("#clear")).to_contain_text("New conversation")
    names = [me.page.get_by_role("tab").nth(number) for number in range(3)]
    for name, words in zip(names, ("Chat", "Attention", "Settings"), strict=True):
        me.expect(name).to_have_text(words)
    me.expect(me.answers.last).to_have_text("一只猫头鹰")  # the conversation is kept
    me.page.reload()
    me.expect(me.page.locator("#clear")).to_contain_text("New conversation")
    me.expect(names[2]).to_have_text("Settings")


@pytest.mark.parametrize("locale", ["zh-TW", "zh-HK", "zh"])
def test_all_chinese_locales_get_chinese(person, locale):
    me = person(locale=locale)
    me.expect(me.page.locator("#clear")).to_contain_text("新对话")


def test_other_locales_get_english(person):
    me = person(locale="de-DE")
    me.expect(me.page.locator("#clear")).to_contain_text("New conversation")
    me.expect(me.page.locator("#chat .placeholder-content")).to_contain_text("Ask about an image")


def test_dark_theme_of_the_system_and_theme_button(person):
    me = person(color_scheme="dark")
    dark = "document.body.classList.contains('dark')"
    me.page.wait_for_function(dark)
    me.page.click("#theme")
    me.page.wait_for_function(f"!{dark}")
    me.page.reload()
    me.page.wait_for_function(f"window.owl2 && !{dark}")


def test_layout_on_a_phone(person, images):
    me = person(**PHONE)
    me.add(*images)
    me.ask("which colors are these, and which of them do you like best of all?")
    me.answer("red, green and blue " * 12)
    wide = "document.documentElement.scrollWidth"
    for number in range(3):
        me.tab(number)
        assert me.page.evaluate(wide) <= 375
    me.tab(0)
    for name in (
        "#box textarea",
        "#show-attention",
        "#regenerate",
        "#clear",
        "#language",
        "#theme",
    ):
        place = me.page.locator(name).bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= 375, name
        assert place["y"] + place["height"] <= 700, name


def test_markup_in_an_answer_runs_and_fetches_nothing(person):
    hits = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        me = person()
        evil = f"![x]({place}/markdown) <img src={place}/html onerror='window.evil = 1'>"
        evil += f"<script>window.evil = 1</script><iframe src={place}/frame></iframe>"
        me.ask(f"{evil} what?")
        me.answer(f"{evil} the end")
        me.expect(me.answers.last).to_contain_text("the end")
        me.page.wait_for_timeout(500)
        assert me.page.evaluate("window.evil") is None
        assert hits == []
    finally:
        server.shutdown()
        server.server_close()


def test_attention_tab(visit, tiny, images):
    me = Page(visit(tiny))
    me.tab(2)
    number = me.page.get_by_label("number input for Maximum length")
    number.fill("8")
    number.blur()
    me.tab(0)
    me.add(*images[:2])
    me.ask("what is this?")
    me.expect(me.page.locator("#box .submit-button")).to_be_visible()
    me.expect(me.answers).to_have_count(1)
    me.expect(me.answers.last).not_to_contain_text("●")
    me.page.click("#show-attention")
    me.expect(me.page.locator(".attention figure")).to_have_count(4)
    shown = "image => image.complete && image.naturalWidth > 0"
    wait_until(
        lambda: all(image.evaluate(shown) for image in me.page.locator(".attention img").all())
    )
    sizes = [figure.bounding_box() for figure in me.page.locator(".attention figure div").all()]
    assert {round(size["width"] / size["height"], 1) for size in sizes} == {1.3}  # 40 x 30

    before = me.page.locator(".attention img.painted").first.get_attribute("src")
    me.expect(me.page.locator("#words label")).not_to_have_count(1)
    me.page.locator("#words label").nth(1).click()
    me.expect(me.page.locator(".attention img.painted").first).not_to_have_attribute("src", before)

    me.page.locator("#language").get_by_text("中文").click()
    me.expect(me.page.locator("#words label").first).to_have_text("整个回答")
    me.expect(me.page.locator(".attention figcaption").first).to_have_text("图片 1")
    me.tab(0)
    me.page.click("#clear")
    me.tab(1)
    me.expect(me.page.locator("#figures")).to_contain_text("请先就图片提问")


def test_owl2_web_command(visit, tiny_checkpoint, tmp_path, images):
    examples = [{"question": "what is red?", "image": str(images[0])}]
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    command = [sys.executable, "-m", "owl2", "web", "--model", str(tiny_checkpoint)]
    command += ["--port", "0", "--device", "cpu", "--examples", str(tmp_path / "examples.json")]
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)  # the test's own process has one
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=tmp_path,
            env=environment,
        ) as process,
    ):
        try:
            url = next(found[1] for line in process.stdout if (found := PAGE.search(line)))
            me = Page(visit(url))
            me.page.locator("#chat .example").click()
            me.expect(me.answers).to_have_count(1)
            me.expect(me.answers.last).not_to_contain_text("●")
            me.expect(me.page.locator("#box .submit-button")).to_be_visible()
            assert any(folder.rglob("red.png"))
            process.terminate()  # the page is still open
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()
    assert not any(folder.rglob("*.png"))
    assert {path.name for path in tmp_path.iterdir()} <= LEFT  # nothing else is left lying about
