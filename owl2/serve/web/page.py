"""The layout of the page and the connections of its events.

::

    header: name, language, theme      tabs: chat · attention · settings
    chat ◄── updates ── ChatHandler    words ──► render ──► figures
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

# Set before gradio is imported. By default gradio reports its use over the network, and all gradio
# programs of a machine share one directory for uploads, from which each deletes files.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
if "GRADIO_TEMP_DIR" not in os.environ:
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="owl2-web-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

import gradio as gr
from gradio.utils import get_upload_folder

from owl2.engine.engine import Engine
from owl2.engine.sampling import DEFAULT_MAX_NEW_TOKENS
from owl2.serve.admission import AdmissionController
from owl2.serve.web.attention_tab import AnswerAttention, AttentionTab, describe, render
from owl2.serve.web.chat_handler import ChatHandler, Decode
from owl2.serve.web.conversation import Conversation
from owl2.serve.web.examples import Example
from owl2.serve.web.i18n import LANGUAGES, text, translations

HERE = Path(__file__).parent
# Seconds: maximum age of an uploaded image, and the interval in which expired ones are deleted.
UPLOAD_MAX_AGE, DELETE_INTERVAL = 4 * 3600, 600
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"]

OWL = (HERE / "owl.svg").read_text("utf-8")

i18n = gr.I18n(**translations())


def theme() -> gr.themes.Base:
    """The theme. Its fonts are included in gradio, so that nothing is downloaded."""
    return gr.themes.Soft(
        primary_hue="orange",
        secondary_hue="orange",
        neutral_hue="stone",
        radius_size="lg",
        # gradio includes all characters of these two weights only.
        font=[gr.themes.LocalFont("Source Sans Pro", (400, 700)), "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


class Page(gr.Blocks):
    """`gr.Blocks` that accepts uploaded files only.

    gradio downloads a URL that a request names as its file, without a size limit. In a mounted app
    it also does not check that a path is an upload, and would return any file of the server.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        if _names_other_files(inputs):
            raise gr.Error("Files must be uploaded.", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _names_other_files(value: Any) -> bool:
    """Whether `value` contains a file that was not uploaded: a URL or another path."""
    if isinstance(value, dict):
        path = value.get("path")
        is_other = isinstance(path, str) and not _is_upload(path)
        return is_other or any(map(_names_other_files, value.values()))
    return isinstance(value, list) and any(map(_names_other_files, value))


def _is_upload(path: str) -> bool:
    directory = get_upload_folder()
    file = Path(os.path.abspath(path))  # resolves ".."; uploads are not links
    directories = (Path(os.path.abspath(directory)), Path(os.path.realpath(directory)))
    return os.path.isabs(path) and any(parent in file.parents for parent in directories)


@dataclass(frozen=True)
class PageComponents:
    """The components that take part in events."""

    language: gr.Radio
    conversation: gr.State
    tabs: gr.Tabs
    tabs_by_label: dict[str, gr.Tab]
    chat: gr.Chatbot
    box: gr.MultimodalTextbox
    regenerate: gr.Button
    show_attention: gr.Button
    clear: gr.Button
    shown: gr.State
    words: gr.Radio
    figures: gr.HTML
    settings: list[Any]


def make_page(
    admission: AdmissionController, decode: Decode, name: str, examples: Sequence[Example]
) -> gr.Blocks:
    """Create the page.

    Args:
        decode: See `ChatHandler`.
        name: The model name to show.
    """
    page = Page(
        title=f"owl2 · {name}",
        analytics_enabled=False,
        delete_cache=(DELETE_INTERVAL, UPLOAD_MAX_AGE),
        fill_width=True,
    )
    with page:
        components = _create_components(admission, name, examples)
        chat_handler = ChatHandler(admission, decode, examples)
        _connect_events(page, components, chat_handler, AttentionTab(admission.engine))
    return page


def _create_components(
    admission: AdmissionController, name: str, examples: Sequence[Example]
) -> PageComponents:
    with gr.Row(elem_id="head"):
        gr.HTML(
            f"<div class='brand'>{OWL}<b>owl2</b><span>{html.escape(name)}</span></div>",
            elem_id="brand",
        )
        language = gr.Radio(
            [(label, key) for key, label in LANGUAGES.items()],
            label=i18n("language"),  # for screen readers
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
            chat.keep_in_cache.update(chat.temp_files)  # example images do not expire
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
            with gr.Row(elem_id="actions"):
                show_attention = gr.Button(i18n("show_attention"), elem_id="show-attention")
                regenerate = gr.Button(i18n("regenerate"), elem_id="regenerate")
                clear = gr.Button(i18n("clear"), elem_id="clear")
        with gr.Tab(i18n("tab_attention"), id="attention", render_children=True) as attention_tab:
            words = gr.Radio([], label=i18n("words"), visible=False, elem_id="words")
            figures = gr.HTML(i18n("attention_help"), elem_id="figures")
        with gr.Tab(i18n("tab_settings"), id="settings", render_children=True) as settings_tab:
            settings = _settings(admission.engine, admission.limits.max_completion_tokens)
    return PageComponents(
        language=language,
        conversation=gr.State(Conversation()),
        tabs=tabs,
        tabs_by_label={
            "tab_chat": chat_tab,
            "tab_attention": attention_tab,
            "tab_settings": settings_tab,
        },
        chat=chat,
        box=box,
        regenerate=regenerate,
        show_attention=show_attention,
        clear=clear,
        shown=gr.State(None),
        words=words,
        figures=figures,
        settings=[language, *settings],
    )


def _card(example: Example) -> Any:
    return {"text": example.question, "files": [str(path) for path in example.images]}


def _settings(engine: Engine, limit: int) -> list[Any]:
    """The controls of `ChatSettings` after the language, with the defaults of the checkpoint."""
    defaults = engine.model.generation_config
    max_tokens = min(limit, engine.context_length)
    temperature = (defaults.temperature or 1.0) if defaults.do_sample else 0.0
    return [
        gr.Slider(
            1,
            max_tokens,
            value=min(defaults.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, max_tokens),
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
        # gr.Number would turn an empty value into 0.
        gr.Textbox("", max_lines=1, label=i18n("seed"), info=i18n("seed_info"), elem_id="seed"),
    ]


def _connect_events(
    page: gr.Blocks, parts: PageComponents, chat_handler: ChatHandler, attention_tab: AttentionTab
) -> None:
    # The admission controller limits the concurrency. The events are not part of gradio's API.
    options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    quiet: dict[str, Any] = {**options, "show_progress": "hidden"}
    chat_inputs = [parts.conversation, *parts.settings]
    chat_outputs = [parts.box, parts.chat]
    parts.box.submit(chat_handler.ask, [parts.box, *chat_inputs], chat_outputs, **quiet)
    parts.chat.example_select(chat_handler.ask_example, chat_inputs, chat_outputs, **quiet)
    parts.regenerate.click(chat_handler.regenerate, chat_inputs, chat_outputs, **quiet)
    parts.box.stop(chat_handler.stop, [parts.conversation], None, **quiet)
    tab_outputs = [parts.shown, parts.words, parts.figures]
    for clear in (parts.clear.click, parts.chat.clear):
        cleared = clear(chat_handler.clear, [parts.conversation], chat_outputs, **quiet)
        cleared.then(attention_tab.clear, [parts.language], tab_outputs, **quiet)

    # The attention is collected when the tab is selected, by the button or directly.
    select_tab = gr.update(selected="attention")
    parts.show_attention.click(lambda: select_tab, None, parts.tabs, **quiet)
    parts.tabs_by_label["tab_attention"].select(
        attention_tab.show,
        [parts.conversation, parts.shown, parts.language],
        tab_outputs,
        **options,
    )
    tab_inputs = [parts.shown, parts.words, parts.language]
    parts.words.input(render, tab_inputs, parts.figures, **quiet)

    page.load(None, None, parts.language, js=(HERE / "page.js").read_text("utf-8"))
    parts.language.input(None, parts.language, js="(language) => window.owl2.choose(language)")

    # The browser translates the static texts, except the labels of tabs that are not selected.
    def translate(shown: AnswerAttention | None, word: int | None, language: str) -> list[Any]:
        labels = [gr.update(label=text(key, language)) for key in parts.tabs_by_label]
        return [*describe(shown, word, language), *labels]

    translated = [parts.words, parts.figures, *parts.tabs_by_label.values()]
    parts.language.change(translate, tab_inputs, translated, **quiet)
