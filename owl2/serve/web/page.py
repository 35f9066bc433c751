"""The page itself: what stands where, and what calls what.

::

    head: name, language, light        tabs: chat · where it looked · settings
    chat ◄── views ── Asking           words ──► paint ──► figures
"""

import atexit
import html
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Both before gradio is imported. It reports its use over the network otherwise; and its folder for
# visitors' images is else one that all its programs on a machine share, and clear for each other.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
if "GRADIO_TEMP_DIR" not in os.environ:
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="owl2-web-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

import gradio as gr
from gradio.utils import get_upload_folder

from owl2.engine.engine import Engine
from owl2.engine.sampling import DEFAULT_MAX_NEW_TOKENS
from owl2.serve.admission import AdmissionController
from owl2.serve.web.attention_tab import Looked, Looking, describe, paint
from owl2.serve.web.chat_handler import Asking, Decode
from owl2.serve.web.conversation import Conversation
from owl2.serve.web.examples import Example
from owl2.serve.web.i18n import LANGUAGES, text, translations

HERE = Path(__file__).parent
# Seconds after which an uploaded image is deleted, and after which they are looked for again.
FILES_LIVE, FILES_LOOK = 4 * 3600, 600
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"]

OWL = (HERE / "owl.svg").read_text("utf-8")

i18n = gr.I18n(**translations())


def theme() -> gr.themes.Base:
    """Fonts come with gradio: nothing is fetched from elsewhere."""
    return gr.themes.Soft(
        primary_hue="orange",
        secondary_hue="orange",
        neutral_hue="stone",
        radius_size="lg",
        # Of its weights only these two are whole; the one between is cut down to a few letters.
        font=[gr.themes.LocalFont("Source Sans Pro", (400, 700)), "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


class Page(gr.Blocks):
    """gradio's, but a file is one that was uploaded.

    Where a request names a URL as its file, gradio itself would download that, of whatever size;
    and it looks whether a path is an upload's only where it has launched a page itself, not where
    the page is in another app: it would give visitors any file that the server can read.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *more: Any, **named: Any
    ) -> Any:
        if _names_other_files(inputs):
            raise gr.Error("Files must be uploaded.", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *more, **named)


def _names_other_files(value: Any) -> bool:
    """Whether something in it is a file that was not uploaded: a URL, or a path elsewhere."""
    if isinstance(value, dict):
        path = value.get("path")
        is_other = isinstance(path, str) and not _is_upload(path)
        return is_other or any(map(_names_other_files, value.values()))
    return isinstance(value, list) and any(map(_names_other_files, value))


def _is_upload(path: str) -> bool:
    folder = get_upload_folder()
    place = Path(os.path.abspath(path))  # without ".."; uploads are no links
    folders = (Path(os.path.abspath(folder)), Path(os.path.realpath(folder)))
    return os.path.isabs(path) and any(one in place.parents for one in folders)


@dataclass(frozen=True)
class Parts:
    """What is in the page and takes part in what happens."""

    language: gr.Radio
    talk: gr.State
    tabs: gr.Tabs
    labelled: dict[str, gr.Tab]
    chat: gr.Chatbot
    box: gr.MultimodalTextbox
    again: gr.Button
    look: gr.Button
    clear: gr.Button
    looked: gr.State
    words: gr.Radio
    figures: gr.HTML
    settings: list[Any]


def make_page(
    admission: AdmissionController, decode: Decode, name: str, examples: Sequence[Example]
) -> gr.Blocks:
    """The page for the engine of a admission.

    Args:
        decode: see `Asking`.
        name: of the model.
        examples: to begin with.
    """
    page = Page(
        title=f"owl2 · {name}",
        analytics_enabled=False,
        delete_cache=(FILES_LOOK, FILES_LIVE),
        fill_width=True,
    )
    with page:
        parts = _lay_out(admission, name, examples)
        _connect(page, parts, Asking(admission, decode, examples), Looking(admission.engine))
    return page


def _lay_out(admission: AdmissionController, name: str, examples: Sequence[Example]) -> Parts:
    with gr.Row(elem_id="head"):
        gr.HTML(
            f"<div class='brand'>{OWL}<b>owl2</b><span>{html.escape(name)}</span></div>",
            elem_id="brand",
        )
        language = gr.Radio(
            [(shown, key) for key, shown in LANGUAGES.items()],
            label=i18n("language"),  # not seen, but read aloud
            show_label=False,
            container=False,
            elem_id="language",
        )
        gr.Button(i18n("theme"), elem_id="theme").click(None, js="() => window.owl2.theme()")
    with gr.Tabs() as tabs:
        with gr.Tab(i18n("tab_chat"), id="chat") as chat_tab:
            chat = gr.Chatbot(
                label=i18n("chat"),
                show_label=False,
                placeholder=str(i18n("welcome")),
                examples=[_card(example) for example in examples],
                buttons=["copy", "copy_all"],
                feedback_options=None,
                latex_delimiters=[],
                elem_id="chat",
            )
            chat.keep_in_cache.update(chat.temp_files)  # the examples are no visitor's
            box = gr.MultimodalTextbox(
                placeholder=str(i18n("question")),
                label=i18n("question"),
                show_label=False,
                file_types=SUFFIXES,
                file_count="multiple",
                sources=["upload"],
                max_plain_text_length=100_000,
                autofocus=True,
                elem_id="box",
            )
            with gr.Row(elem_id="acts"):
                look = gr.Button(i18n("look"), elem_id="look")
                again = gr.Button(i18n("again"), elem_id="again")
                clear = gr.Button(i18n("clear"), elem_id="clear")
        with gr.Tab(i18n("tab_looked"), id="looked", render_children=True) as looked_tab:
            words = gr.Radio([], label=i18n("words"), visible=False, elem_id="words")
            figures = gr.HTML(i18n("looked_help"), elem_id="figures")
        with gr.Tab(i18n("tab_settings"), id="settings", render_children=True) as settings_tab:
            settings = _settings(admission.engine, admission.limits.max_completion_tokens)
    return Parts(
        language=language,
        talk=gr.State(Conversation()),
        tabs=tabs,
        labelled={"tab_chat": chat_tab, "tab_looked": looked_tab, "tab_settings": settings_tab},
        chat=chat,
        box=box,
        again=again,
        look=look,
        clear=clear,
        looked=gr.State(None),
        words=words,
        figures=figures,
        settings=[language, *settings],
    )


def _card(example: Example) -> Any:
    return {"text": example.question, "files": [str(path) for path in example.images]}


def _settings(engine: Engine, limit: int) -> list[Any]:
    """In the order of `asking.Settings`; as the checkpoint has them."""
    defaults = engine.model.generation_config
    most = min(limit, engine.context_length)
    temperature = (defaults.temperature or 1.0) if defaults.do_sample else 0.0
    return [
        gr.Slider(
            1,
            most,
            value=min(defaults.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, most),
            step=1,
            label=i18n("max_new_tokens"),
            info=i18n("max_new_tokens_info"),
        ),
        gr.Slider(
            0,
            2,
            value=temperature,
            step=0.05,
            label=i18n("temperature"),
            info=i18n("temperature_info"),
        ),
        gr.Slider(
            0.05,
            1,
            value=defaults.top_p or 1.0,
            step=0.05,
            label=i18n("top_p"),
            info=i18n("top_p_info"),
        ),
        # No Number: the browser would make a 0 of an empty one.
        gr.Textbox("", max_lines=1, label=i18n("seed"), info=i18n("seed_info"), elem_id="seed"),
    ]


def _connect(page: gr.Blocks, parts: Parts, asking: Asking, looking: Looking) -> None:
    shown = [parts.box, parts.chat]
    # The admission says how many are answered at a time. No names: these are no API for others.
    many: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    given = [parts.talk, *parts.settings]
    quiet: dict[str, Any] = {**many, "show_progress": "hidden"}
    parts.box.submit(asking.ask, [parts.box, *given], shown, **quiet)
    parts.chat.example_select(asking.ask_example, given, shown, **quiet)
    parts.again.click(asking.again, given, shown, **quiet)
    parts.box.stop(asking.stop, [parts.talk], None, **quiet)
    looked = [parts.looked, parts.words, parts.figures]
    for cleared in (parts.clear.click, parts.chat.clear):
        empty = cleared(asking.clear, [parts.talk], shown, **quiet)
        empty.then(looking.forget, [parts.language], looked, **quiet)

    # To open the tab is to look, however it is opened.
    parts.look.click(lambda: gr.update(selected="looked"), None, parts.tabs, **quiet)
    parts.labelled["tab_looked"].select(
        looking.show, [parts.talk, parts.looked, parts.language], looked, **many
    )
    chosen = [parts.looked, parts.words, parts.language]
    parts.words.input(paint, chosen, parts.figures, **quiet)

    page.load(None, None, parts.language, js=(HERE / "page.js").read_text("utf-8"))
    parts.language.input(None, parts.language, js="(language) => window.owl2.choose(language)")

    # What the browser has in both languages it changes itself, but for the names of closed tabs;
    # what the server said is said anew.
    def translate(looked: Looked | None, word: int | None, language: str) -> list[Any]:
        names = [gr.update(label=text(key, language)) for key in parts.labelled]
        return [*describe(looked, word, language), *names]

    said = [parts.words, parts.figures, *parts.labelled.values()]
    parts.language.change(translate, chosen, said, **quiet)
