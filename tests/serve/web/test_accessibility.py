"""The page for everyone: axe-core in both themes, narrow screens, keyboard, and signing in."""

import pytest

from tests.serve.running import run_app
from tests.videos import make_video

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

KEY = "a-key-of-the-test"
TABS = 3


def check(page, name):
    """No violation of any rule of axe-core, best practices included."""
    from axe_playwright_python.sync_playwright import Axe

    assert page.locator("h1:not([aria-level])").count() == 1, name
    page.mouse.move(2, 2)
    page.wait_for_timeout(500)  # transitions of colors
    violations = Axe().run(page).response["violations"]
    found = [(rule["id"], node["html"][:200]) for rule in violations for node in rule["nodes"]]
    assert found == [], name


def phone(width):
    return {"viewport": {"width": width, "height": 700}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violation(open_chat, images, theme):
    chat = open_chat(color_scheme=theme)
    for number in range(TABS):
        chat.tab(number)
        check(chat.page, f"tab {number}, empty")
    chat.tab(0)
    chat.add(*images)
    check(chat.page, "images in the text box")
    chat.ask("which *colors*?")
    chat.next_request().emit("# Colors\n\nred, `green`")
    chat.expect(chat.answers.last).to_contain_text("red")
    check(chat.page, "an answer is generated")
    chat.page.locator("#box .stop-button").click()
    chat.expect(chat.page.locator("#box .submit-button")).to_be_visible()
    chat.ask(" ")
    chat.expect(chat.notification).to_be_visible()
    check(chat.page, "an error")
    chat.page.click("#edit")
    chat.expect(chat.box).to_have_value("which *colors*?")
    check(chat.page, "a question is edited")


@pytest.mark.parametrize(
    ("theme", "media"), [("light", "images"), ("dark", "images"), ("light", "video")]
)
def test_axe_finds_no_violation_in_the_attention_tab(visit, tiny, images, tmp_path, theme, media):
    from tests.serve.web.browser_page import Page

    chat = Page(visit(tiny, color_scheme=theme))
    chat.tab(2)
    number = chat.page.get_by_label("number input for Maximum length")
    number.fill("4")
    number.blur()
    chat.tab(0)
    chat.add(*(images[:2] if media == "images" else [make_video(tmp_path / "x.mp4")]))
    chat.ask("what is this?")
    chat.expect(chat.answers).to_have_count(1)
    chat.expect(chat.page.locator("#box .submit-button")).to_be_visible()
    check(chat.page, "an answer")
    chat.page.click("#show-attention")
    num_images = 2 if media == "images" else 8
    chat.expect(chat.page.locator(".attention figure")).to_have_count(2 * num_images)
    check(chat.page, "attention")
    chat.page.set_viewport_size({"width": 320, "height": 700})
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 320


@pytest.fixture(scope="module")
def with_keys(tiny_engine):
    """The URL of a page that requires a key."""
    from owl2.serve.app import build_app
    from owl2.serve.auth import ApiKeys
    from owl2.serve.config import ServerLimits
    from owl2.serve.web.mount import mount

    keys = ApiKeys([KEY])
    app = build_app(tiny_engine, "tiny", ServerLimits(), keys)
    mount(app, tiny_engine, ServerLimits(), name="tiny <model>", keys=keys)
    with run_app(app) as url:
        yield f"{url}/web/"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_sign_in_and_out(browser, with_keys, theme):
    context = browser.new_context(color_scheme=theme, locale="en-US", **phone(320))
    page = context.new_page()
    page.goto(with_keys)
    assert page.title() == "Sign in · owl2 · tiny <model>"
    key = page.get_by_label("API key")
    assert key.get_attribute("autocomplete") == "current-password"
    check(page, "sign in")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    key.fill("another key")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("alert").get_by_text("not valid").wait_for()
    check(page, "wrong key")
    key.fill(KEY)
    key.press("Enter")
    page.locator("#box textarea").wait_for()
    page.wait_for_function("window.owl2")
    check(page, "signed in")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("API key").wait_for()
    page.goto(with_keys)
    page.get_by_label("API key").wait_for()
    context.close()


def test_login_page_in_chinese(browser, with_keys):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(with_keys)
    page.get_by_role("button", name="登录").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    context.close()


def box(locator):
    place = locator.bounding_box()
    return place["x"], place["y"], place["x"] + place["width"], place["y"] + place["height"]


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("width", [320, 375])
def test_narrow_screens(open_chat, images, width, locale):
    """Nothing is cut off, and no control covers another."""
    chat = open_chat(locale=locale, **phone(width))
    for number in (*range(1, TABS), 0):
        chat.tab(number)
        assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
    chat.add(*images)
    chat.ask("which colors are these, and which of them do you like best of all?")
    chat.answer("red, green and blue " * 12 + "x" * 200)
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
    names = ("#brand", "#language", "#theme", "#chat", "#box", "#show-attention", "#edit")
    places = {name: box(chat.page.locator(name)) for name in (*names, "#regenerate", "#clear")}
    for name, (left, top, right, bottom) in places.items():
        assert left >= 0 and right <= width, name
        assert top >= 0 and bottom <= 700, name
        for other, (x1, y1, x2, y2) in places.items():
            separate = right <= x1 + 1 or x2 <= left + 1 or bottom <= y1 + 1 or y2 <= top + 1
            assert other == name or separate, (name, other)
    cut_off = """(elements) => elements
        .filter((element) => element.scrollWidth > element.clientWidth + 1)
        .map((element) => element.textContent)"""
    texts = "#actions button, #language label, [role=tab], #brand span, #chat .md p"
    assert chat.page.locator(texts).evaluate_all(cut_off) == []


def test_images_of_a_question_are_side_by_side(open_chat, images):
    chat = open_chat()
    chat.add(*images)
    chat.ask("which colors?")
    chat.answer("red")
    shown = chat.page.locator("#chat .user.message .component")
    chat.expect(shown).to_have_count(3)
    places = [box(shown.nth(number)) for number in range(3)]
    assert len({place[3] for place in places}) == 1  # the same lower edge
    assert places[0][2] <= places[1][0] and places[1][2] <= places[2][0]


def test_arrow_keys_select_tabs(open_chat):
    chat = open_chat()
    tabs = chat.page.get_by_role("tab")
    chat.expect(tabs.nth(1)).to_have_attribute("tabindex", "-1")
    tabs.nth(0).focus()
    for key, selected in (("ArrowRight", 1), ("End", 2), ("ArrowRight", 0), ("ArrowLeft", 2)):
        chat.page.keyboard.press(key)
        chat.expect(tabs.nth(selected)).to_have_attribute("aria-selected", "true")
        chat.expect(tabs.nth(selected)).to_be_focused()
    chat.page.keyboard.press("Home")
    chat.expect(chat.page.get_by_label("Seed")).not_to_be_visible()
    chat.expect(chat.box).to_be_visible()
