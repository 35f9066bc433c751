"""Images of the page for the documents: `python tests/serve/web/screenshots.py MODEL FOLDER`.

They are of the demo's model, which answers questions about plain shapes:
`make demo`, then `python tests/serve/web/screenshots.py runs/demo/model docs/images`.

With `--widths`, they show each tab in both themes at several widths instead, for a review.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[3]))

from owl2.engine.engine import Engine
from owl2.serve.app import build_app
from owl2.serve.config import ServerLimits
from owl2.serve.web.mount import mount
from tests.serve.running import run_app

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DESKTOP = {"viewport": {"width": 1100, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True}
MOST_BYTES = 150_000
WIDTHS = (320, 375, 768, 1280)


def open_page(browser: Browser, url: str, **settings: object) -> Page:
    page = browser.new_context(**({"locale": "en-US"} | settings)).new_page()
    page.goto(url)
    page.wait_for_function("window.owl2")
    expect(page.locator("#chat .example")).to_have_count(3)
    loaded = (
        "document.fonts.status === 'loaded' && [...document.images].every((i) => i.naturalWidth)"
    )
    page.wait_for_function(loaded)
    page.wait_for_timeout(500)
    return page


def talk(page: Page, example: int, *questions: str) -> Page:
    """An example, and questions after it, each answered."""
    answers = page.get_by_test_id("bot")
    page.locator("#chat .example").nth(example).click()
    for number, question in enumerate(("", *questions), 1):
        if question:
            page.fill("#box textarea", question)
            page.click("#box .submit-button")
        expect(answers).to_have_count(number)
        expect(answers.last).not_to_contain_text("●")
        expect(page.locator("#box .submit-button")).to_be_visible()
    page.mouse.move(5, 5)
    page.wait_for_timeout(600)
    return page


def show_attention(page: Page) -> Page:
    page.click("#show-attention")
    expect(page.locator(".attention figure")).to_have_count(2)
    page.mouse.move(5, 5)
    page.wait_for_timeout(600)
    return page


def shoot(page: Page, path: Path) -> None:
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(200)
    image = Image.open(io.BytesIO(page.screenshot()))
    image.convert("RGB").save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        image.convert("RGB").quantize(256).save(path, optimize=True)
    size = path.stat().st_size
    assert size < MOST_BYTES, f"{path} has {size} bytes"
    print(path, image.size, size)
    page.context.close()


def shoot_all(browser: Browser, url: str, folder: Path) -> None:
    """Every tab with and without a conversation, in both themes, at all widths."""
    for width in WIDTHS:
        for theme in ("light", "dark"):
            view = {"viewport": {"width": width, "height": 800}, "color_scheme": theme}
            page = open_page(browser, url, **view)
            page.screenshot(path=folder / f"start-{width}-{theme}.png")
            page.get_by_role("tab").nth(2).click()
            page.screenshot(path=folder / f"settings-{width}-{theme}.png")
            page.get_by_role("tab").nth(0).click()
            talk(page, 0, "what color is the shape?")
            page.screenshot(path=folder / f"chat-{width}-{theme}.png")
            show_attention(page).screenshot(path=folder / f"attention-{width}-{theme}.png")
            page.context.close()


def main(model: str, folder: Path, widths: bool) -> None:
    engine = Engine.from_pretrained(model, device="cpu", dtype="float32")
    name = "easy-VQA"
    app = build_app(engine, name)
    mount(app, engine, ServerLimits(), name=name)
    expect.set_options(timeout=60_000)
    with run_app(app) as place, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=ARGUMENTS
        )
        url = f"{place}/web/"
        if widths:
            shoot_all(browser, url, folder)
            return
        color = "what color is the shape?"
        shoot(open_page(browser, url, **DESKTOP), folder / "web.png")
        page = open_page(browser, url, color_scheme="dark", **DESKTOP)
        shoot(talk(page, 0, color), folder / "web-dark.png")
        page = open_page(browser, url, **DESKTOP)
        shoot(show_attention(talk(page, 0, color)), folder / "web-attention.png")
        page = open_page(browser, url, locale="zh-CN", **DESKTOP)
        shoot(talk(page, 2, color), folder / "web-zh.png")
        page = open_page(browser, url, **PHONE)
        shoot(talk(page, 1, "what shape is in the image?"), folder / "web-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--widths" in sys.argv)
