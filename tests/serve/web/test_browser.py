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
from tests.serve.web.browser_page import Page
from tests.videos import make_video

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

PAGE = re.compile(r"Web page: (http://\S+)")
EXPECTED_FILES = {"examples.json", "temporary", "log", "red.png", "green.png", "blue.png"}


def test_upload_ask_stream_and_follow_up(open_chat, images):
    chat = open_chat()
    chat.add(*images[:2])
    chat.ask("which colors?")
    request = chat.next_request()
    parts = request.messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]
    assert [part["image"].getpixel((2, 2)) for part in parts[:2]] == [(255, 0, 0), (0, 128, 0)]
    chat.expect(chat.answers.last).to_contain_text("●")  # waiting for the first token
    request.emit("red")
    chat.expect(chat.answers.last).to_have_text("red")
    assert chat.page.locator("#box .stop-button").is_visible()
    request.emit(" and green")
    request.end()
    chat.expect(chat.answers.last).to_have_text("red and green")
    chat.expect(chat.page.locator("#chat img[src*=gradio_api]")).to_have_count(2)
    chat.expect(chat.box).to_have_value("")

    chat.box.fill("sure?")
    chat.box.press("Enter")
    second = chat.answer("yes")
    assert [message["role"] for message in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1]["content"] == "red and green"
    chat.expect(chat.answers).to_have_count(2)
    chat.expect(chat.answers.last).to_have_text("yes")


def test_a_broken_file_is_named_and_the_question_stays(open_chat, images):
    chat = open_chat()
    broken = images[0].parent / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:50])
    chat.add(broken)
    chat.ask("what is it?")
    chat.expect(chat.notification).to_contain_text("broken.png")
    chat.expect(chat.box).to_have_value("what is it?")
    chat.expect(chat.answers).to_have_count(0)
    chat.page.locator("#box .thumbnail-item .delete-button").click()
    chat.add(images[0])
    chat.page.locator("#box .submit-button").click()
    chat.answer("red")
    chat.expect(chat.answers.last).to_have_text("red")


def test_a_file_that_is_too_large_is_rejected(open_chat, tmp_path):
    chat = open_chat()
    (tmp_path / "large.png").write_bytes(b"x" * 60_000)
    chat.page.set_input_files("#box input[type=file]", tmp_path / "large.png")
    chat.expect(chat.notification).to_be_visible()
    chat.ask("what?")
    assert chat.answer("nothing").messages[0]["content"] == [{"type": "text", "text": "what?"}]


def test_an_image_can_be_dropped_anywhere(open_chat, images):
    chat = open_chat()
    data = chat.page.evaluate_handle(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "red.png", { type: "image/png" }));
            return data;
        }""",
        list(images[0].read_bytes()),
    )
    chat.page.dispatch_event("#chat", "drop", {"dataTransfer": data})
    chat.expect(chat.page.locator("#box .thumbnail-item")).to_have_count(1)
    chat.ask("what color?")
    assert chat.answer("red").messages[0]["content"][0]["image"].getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("place", ["body", "#box textarea"])
def test_paste_anywhere(open_chat, images, place):
    chat = open_chat()
    paste = """(element, bytes) => {
        const data = new DataTransfer();
        const file = () => new File([new Uint8Array(bytes)], "red.png", { type: "image/png" });
        if (bytes) data.items.add(file());
        else data.setData("text/plain", "what *is* it?");
        const options = { clipboardData: data, bubbles: true, cancelable: true };
        element.dispatchEvent(new ClipboardEvent("paste", options));
    }"""
    target = chat.page.locator(place)
    target.evaluate(paste, list(images[0].read_bytes()))
    chat.expect(chat.page.locator("#box .thumbnail-item")).to_have_count(1)
    chat.expect(chat.page.locator("#box .loader")).to_have_count(0)
    if place == "body":
        target.evaluate(paste, None)
        chat.expect(chat.box).to_have_value("what *is* it?")
    else:
        chat.box.fill("what?")
    chat.page.locator("#box .submit-button").click()
    assert chat.answer("red").messages[0]["content"][0]["image"].getpixel((1, 1)) == (255, 0, 0)


def test_edit_a_question(open_chat, images):
    chat = open_chat()
    chat.add(images[0])
    chat.ask("what colr?")
    chat.answer("red")
    chat.page.click("#edit")
    chat.expect(chat.box).to_have_value("what colr?")
    chat.expect(chat.page.locator("#box .thumbnail-item")).to_have_count(1)
    chat.ask("what color?")
    assert len(chat.answer("it is red").messages) == 1
    chat.expect(chat.questions.last).to_have_text("what color?")
    chat.expect(chat.answers).to_have_count(1)


def test_errors_stay_until_they_are_closed(open_chat):
    chat = open_chat()
    chat.page.clock.install()
    chat.ask(" ")
    chat.expect(chat.notification).to_contain_text("Type a question first")
    chat.page.clock.run_for(120_000)
    chat.expect(chat.notification).to_be_visible()
    chat.page.get_by_test_id("toast-close").click()
    chat.page.clock.run_for(2_000)
    chat.expect(chat.notification).to_have_count(0)


def test_copied_conversation_contains_the_typed_questions(open_chat):
    chat = open_chat(permissions=["clipboard-read", "clipboard-write"])
    chat.ask("what is <this>, *exactly*?")
    chat.answer("a *red* circle")
    chat.page.get_by_role("button", name="Copy conversation").click()
    expected = "user: what is <this>, *exactly*?\n\nassistant: a *red* circle"
    chat.page.wait_for_function("navigator.clipboard.readText().then((text) => text)")
    assert chat.page.evaluate("navigator.clipboard.readText()") == expected


def test_stop_regenerate_and_clear(open_chat):
    chat = open_chat()
    chat.ask("count!")
    request = chat.next_request()
    request.emit("one two")
    chat.expect(chat.answers.last).to_have_text("one two")
    chat.page.locator("#box .stop-button").click()
    chat.expect(chat.answers.last).to_contain_text("(stopped)")
    assert request.aborted
    chat.expect(chat.page.locator("#box .submit-button")).to_be_visible()

    chat.page.click("#regenerate")
    chat.answer("one two three")
    chat.expect(chat.answers).to_have_count(1)
    chat.expect(chat.answers.last).to_have_text("one two three")

    chat.page.click("#clear")
    chat.expect(chat.answers).to_have_count(0)
    chat.expect(chat.page.locator("#chat .example")).to_have_count(3)
    chat.ask("and now?")
    assert len(chat.answer("new").messages) == 1


def test_copy_an_answer(open_chat):
    chat = open_chat(permissions=["clipboard-read", "clipboard-write"])
    chat.ask("what?")
    chat.answer("a *red* circle")
    chat.page.get_by_role("button", name="Copy message").last.click()
    chat.page.wait_for_function("navigator.clipboard.readText().then((text) => text)")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "a *red* circle"


def test_a_click_on_an_example_asks_it(open_chat):
    chat = open_chat()
    cards = chat.page.locator("#chat .example")
    chat.expect(cards).to_have_count(3)
    shown = "image => image.complete && image.naturalWidth > 0"
    assert all(cards.nth(number).locator("img").evaluate(shown) for number in range(3))
    cards.nth(2).click()
    request = chat.answer("yes")
    assert request.messages[0]["content"][1]["text"] == "is there a blue shape?"
    chat.expect(chat.answers.last).to_have_text("yes")


def test_settings_reach_the_engine(open_chat):
    chat = open_chat()
    chat.tab(2)
    for label, value in (("Maximum length", "9"), ("Temperature", "0.5"), ("Top p", "0.9")):
        number = chat.page.get_by_label(f"number input for {label}")
        number.fill(value)
        number.blur()
    chat.page.get_by_label("Seed").fill("5")
    chat.tab(0)
    chat.ask("what?")
    request = chat.answer("this")
    assert request.options == {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 5}


def test_closing_the_page_frees_the_slot(open_chat):
    chat = open_chat()
    chat.ask("what?")
    request = chat.next_request()
    request.emit("this")
    chat.expect(chat.answers.last).to_have_text("this")
    chat.page.close()

    def is_aborted():
        request.emit(" and")  # gradio notices the disconnect at the next update
        return request.aborted

    wait_until(is_aborted, 20)


def test_language_of_the_browser_and_language_switch(open_chat):
    chat = open_chat(locale="zh-CN")
    chat.expect(chat.page.locator("#chat")).to_contain_text("就图片或视频提问")
    chat.expect(chat.page.locator("#clear")).to_contain_text("新对话")
    chat.ask(" ")
    chat.expect(chat.notification).to_contain_text("请先输入问题")
    chat.expect(chat.box).to_have_value(" ")
    chat.ask("这是什么？")
    chat.answer("一只猫头鹰")

    chat.page.locator("#language").get_by_text("English").click()
    chat.expect(chat.page.locator("#clear")).to_contain_text("New conversation")
    names = [chat.page.get_by_role("tab").nth(number) for number in range(3)]
    for name, label in zip(names, ("Chat", "Attention", "Settings"), strict=True):
        chat.expect(name).to_have_text(label)
    chat.expect(chat.answers.last).to_have_text("一只猫头鹰")  # the conversation is kept
    chat.page.reload()
    chat.expect(chat.page.locator("#clear")).to_contain_text("New conversation")
    chat.expect(names[2]).to_have_text("Settings")


@pytest.mark.parametrize("locale", ["zh-TW", "zh-HK", "zh"])
def test_all_chinese_locales_get_chinese(open_chat, locale):
    chat = open_chat(locale=locale)
    chat.expect(chat.page.locator("#clear")).to_contain_text("新对话")


def test_other_locales_get_english(open_chat):
    chat = open_chat(locale="de-DE")
    chat.expect(chat.page.locator("#clear")).to_contain_text("New conversation")
    chat.expect(chat.page.locator("#chat .placeholder-content")).to_contain_text(
        "Ask about an image"
    )


def test_dark_theme_of_the_system_and_theme_button(open_chat):
    chat = open_chat(color_scheme="dark")
    dark = "document.body.classList.contains('dark')"
    chat.page.wait_for_function(dark)
    chat.page.click("#theme")
    chat.page.wait_for_function(f"!{dark}")
    chat.page.reload()
    chat.page.wait_for_function(f"window.owl2 && !{dark}")


def test_markup_in_an_answer_runs_and_fetches_nothing(open_chat):
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
        chat = open_chat()
        evil = f"![x]({place}/markdown) <img src={place}/html onerror='window.evil = 1'>"
        evil += f"<script>window.evil = 1</script><iframe src={place}/frame></iframe>"
        chat.ask(f"{evil} *what*?")
        chat.answer(f"{evil} the end")
        chat.expect(chat.answers.last).to_contain_text("the end")
        assert chat.questions.last.inner_text() == f"{evil} *what*?"
        chat.page.wait_for_timeout(500)
        assert chat.page.evaluate("window.evil") is None
        assert hits == []
    finally:
        server.shutdown()
        server.server_close()


def test_attention_tab(visit, tiny, images):
    chat = Page(visit(tiny))
    chat.tab(2)
    number = chat.page.get_by_label("number input for Maximum length")
    number.fill("8")
    number.blur()
    chat.tab(0)
    chat.add(*images[:2])
    chat.ask("what is this?")
    chat.expect(chat.answers).to_have_count(1)  # has started; the tab waits for its end
    chat.page.click("#show-attention")
    chat.expect(chat.page.locator(".attention figure")).to_have_count(4)
    shown = "image => image.complete && image.naturalWidth > 0"
    wait_until(
        lambda: all(image.evaluate(shown) for image in chat.page.locator(".attention img").all())
    )
    sizes = [figure.bounding_box() for figure in chat.page.locator(".attention figure div").all()]
    assert {round(size["width"] / size["height"], 1) for size in sizes} == {1.3}  # 40 x 30

    before = chat.page.locator(".attention img.painted").first.get_attribute("src")
    chat.expect(chat.page.locator("#words label")).not_to_have_count(1)
    chat.page.locator("#words label").nth(1).click()
    chat.expect(chat.page.locator(".attention img.painted").first).not_to_have_attribute(
        "src", before
    )

    chat.page.locator("#language").get_by_text("中文").click()
    chat.expect(chat.page.locator("#words label").first).to_have_text("整个回答")
    chat.expect(chat.page.locator(".attention figcaption").first).to_have_text("图片 1")
    chat.tab(0)
    chat.page.click("#clear")
    chat.tab(1)
    chat.expect(chat.page.locator("#figures")).to_contain_text("请先就图片提问")


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
            chat = Page(visit(url))
            chat.page.locator("#chat .example").click()
            chat.expect(chat.answers).to_have_count(1)
            chat.expect(chat.answers.last).not_to_contain_text("●")
            chat.expect(chat.page.locator("#box .submit-button")).to_be_visible()
            assert any(folder.rglob("red.png"))
            process.terminate()  # the page is still open
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()
    assert not any(folder.rglob("*.png"))
    assert {path.name for path in tmp_path.iterdir()} <= EXPECTED_FILES  # no other files remain


def test_video_is_played_and_its_frames_have_heatmaps(visit, tiny, tmp_path):
    chat = Page(visit(tiny))
    chat.tab(2)
    number = chat.page.get_by_label("number input for Maximum length")
    number.fill("8")
    number.blur()
    chat.tab(0)
    chat.add(make_video(tmp_path / "x.mp4"))
    chat.ask("what is this?")
    chat.expect(chat.page.locator("#chat video")).to_have_count(1)
    chat.expect(chat.answers).to_have_count(1)
    chat.page.click("#show-attention")
    chat.expect(chat.page.locator(".attention figure")).to_have_count(2 * 8)
