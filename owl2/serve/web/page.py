"""The layout of the page and the connections of its events.

::

    header: name, language, theme      tabs: chat · attention · settings
    chat ◄── updates ── ChatHandler    words ──► render ──► figures
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import gradio as gr

from owl2.engine.engine import Engine
from owl2.engine.sampling_params import DEFAULT_MAX_NEW_TOKENS
from owl2.processing.media_file import IMAGE_SUFFIXES
from owl2.processing.video import VIDEO_SUFFIXES
from owl2.serve.admission import AdmissionController, current_client
from owl2.serve.errors import as_api_error
from owl2.serve.image_decoder import SandboxedImageDecoder
from owl2.serve.origins import client_network
from owl2.serve.web.attention_tab import AnswerAttention, AttentionTab, describe, render
from owl2.serve.web.chat_handler import ChatHandler
from owl2.serve.web.conversation import Conversation
from owl2.serve.web.examples import Example
from owl2.serve.web.gateway import session_owner
from owl2.serve.web.i18n import LANGUAGES, TEXTS, text, translations
from owl2.serve.web.uploads import UploadStore

HERE = Path(__file__).parent

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


def login_page(name: str) -> str:
    """The HTML of the page on which a visitor signs in."""
    keys = ("sign_in", "api_key", "no_reply", "wrong_key")
    return Template((HERE / "login.html").read_text("utf-8")).substitute(
        title=html.escape(f"{TEXTS['sign_in']['en']} · owl2 · {name}"),
        name=html.escape(name),
        owl=OWL,
        texts=json.dumps({key: TEXTS[key] for key in keys}),
    )


# Sessions that the server remembers. The browser restores others, see `Conversation.restore`.
MAX_SESSIONS = 1000


class Page(gr.Blocks):
    """The page. It accepts uploaded files only.

    gradio downloads a URL that a request names as its file, without a size limit. In a mounted app
    it also does not check that a path is an upload, and would return any file of the server.

    Args:
        decoder: Of images and videos.
        name: The model name to show.
        uploads: The files that visitors may use.
        has_sign_in: Whether visitors sign in, and can therefore sign out.
    """

    def __init__(
        self,
        admission: AdmissionController,
        decoder: SandboxedImageDecoder,
        name: str,
        examples: Sequence[Example],
        uploads: UploadStore,
        has_sign_in: bool = False,
    ) -> None:
        self._uploads = uploads
        super().__init__(
            title=f"owl2 · {name}",
            analytics_enabled=False,
            fill_width=True,
        )
        self.state_session_capacity = MAX_SESSIONS
        with self:
            self.conversation = gr.State(Conversation())
            self.shown = gr.State(None)  # in the attention tab
            # The browser's copy of the conversation: the server forgets it in a restart.
            self.memory = gr.JSON([], visible="hidden")
            self.recover = gr.Button(visible="hidden", elem_id="recover")
            gr.HTML(i18n("connection_lost"), elem_id="connection-lost")
            gr.HTML(i18n("signed_out"), elem_id="signed-out")
            self._create_header(name, has_sign_in)
            with gr.Tabs() as self.tabs:
                with gr.Tab(i18n("tab_chat"), id="chat") as chat_tab:
                    self._create_chat(examples)
                with gr.Tab(i18n("tab_attention"), id="attention", render_children=True) as maps:
                    self.words = gr.Radio([], label=i18n("words"), visible=False, elem_id="words")
                    self.figures = gr.HTML(i18n("attention_help"), elem_id="figures")
                with gr.Tab(i18n("tab_settings"), id="settings", render_children=True) as settings:
                    limit = admission.limits.max_completion_tokens
                    self.settings = [self.language, *_settings(admission.engine, limit)]
            self.tab = {"tab_chat": chat_tab, "tab_attention": maps, "tab_settings": settings}
            handler = ChatHandler(admission, decoder, examples)
            self._connect(handler, AttentionTab(admission.engine, handler.load_files))

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        current_client.set(client_network(getattr(kwargs["request"], "client", None)))
        try:
            if self._names_other_files(kwargs["inputs"], session_owner(kwargs["session_hash"])):
                raise gr.Error("Files must be uploaded.", print_exception=False)
            return await super().process_api(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:  # gradio would print the traceback each time
            raise gr.Error(as_api_error(error).message, print_exception=False) from error

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        try:
            return list(await super().preprocess_data(*args, **kwargs))
        except Exception as error:  # the inputs are not those of the page
            raise gr.Error("Invalid input.", print_exception=False) from error

    def _names_other_files(self, inputs: Any, visitor: str) -> bool:
        """Whether `inputs` contain a file that the visitor did not upload: a URL or a path."""
        values = [inputs]
        while values:
            value = values.pop()
            if isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                values += value.values()
                path = value.get("path")
                if isinstance(path, str) and not self._uploads.can_read(visitor, path):
                    return True
        return False

    def _create_header(self, name: str, has_sign_in: bool) -> None:
        with gr.Row(elem_id="head"):
            gr.HTML(
                f"<div class='brand'>{OWL}<h1>owl2</h1><span>{html.escape(name)}</span></div>",
                elem_id="brand",
            )
            self.language = gr.Radio(
                [(label, key) for key, label in LANGUAGES.items()],
                label=i18n("language"),  # for screen readers
                show_label=False,
                container=False,
                elem_id="language",
            )
            gr.Button(i18n("theme"), elem_id="theme").click(None, js="() => window.owl2.theme()")
            if has_sign_in:
                sign_out = gr.Button(i18n("sign_out"), elem_id="sign-out")
                sign_out.click(None, js="() => window.owl2.signOut()")

    def _create_chat(self, examples: Sequence[Example]) -> None:
        self.chat = gr.Chatbot(
            label=i18n("chat"),
            show_label=False,
            placeholder=str(i18n("welcome")),
            examples=[
                {"text": example.question, "files": list(map(str, example.images))}
                for example in examples
            ],
            buttons=["copy", "copy_all"],
            feedback_options=None,
            latex_delimiters=[],
            elem_id="chat",
        )
        for example in examples:
            self._uploads.page_files.update(map(str, example.images))
        self._uploads.page_files.update(self.chat.temp_files)  # gradio's copies of them
        self.box = gr.MultimodalTextbox(
            placeholder=str(i18n("question")),
            label=i18n("question"),
            show_label=False,
            file_types=[*IMAGE_SUFFIXES, *VIDEO_SUFFIXES],
            file_count="multiple",
            sources=["upload"],
            max_plain_text_length=100_000,
            autofocus=True,
            elem_id="box",
        )
        with gr.Row(elem_id="actions"):
            self.show_attention = gr.Button(i18n("show_attention"), elem_id="show-attention")
            self.edit = gr.Button(i18n("edit"), elem_id="edit")
            self.regenerate = gr.Button(i18n("regenerate"), elem_id="regenerate")
            self.new_conversation = gr.Button(i18n("clear"), elem_id="clear")

    def _connect(self, chat_handler: ChatHandler, attention_tab: AttentionTab) -> None:
        # The admission controller limits the concurrency. The events are not part of gradio's API.
        options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
        quiet: dict[str, Any] = {**options, "show_progress": "hidden"}
        chat_inputs = [self.conversation, self.memory, *self.settings]
        chat_outputs = [self.box, self.chat, self.memory]
        # After a restart of the server, the browser uploads the images of the conversation again.
        upload: dict[str, Any] = {"js": "(...inputs) => window.owl2.upload(inputs)"}
        send: dict[str, Any] = {"js": "(...inputs) => window.owl2.send(inputs)"}
        self.box.submit(chat_handler.ask, [self.box, *chat_inputs], chat_outputs, **quiet, **send)
        self.chat.example_select(
            chat_handler.ask_example, chat_inputs, chat_outputs, **quiet, **upload
        )
        self.regenerate.click(chat_handler.regenerate, chat_inputs, chat_outputs, **quiet, **upload)
        edit_inputs = [self.conversation, self.memory, self.language]
        edited = self.edit.click(chat_handler.edit, edit_inputs, chat_outputs, **quiet, **upload)
        edited.then(None, js="() => document.querySelector('#box textarea').focus()")
        self.recover.click(
            chat_handler.recover,
            [self.box, self.conversation, self.memory],
            chat_outputs,
            **quiet,
            js="(...inputs) => window.owl2.resend(inputs)",
        )
        self.box.change(None, self.box, js="(box) => window.owl2?.write(box)")
        self.memory.change(None, self.memory, js="(memory) => window.owl2.keep(memory)")
        self.box.stop(chat_handler.stop, [self.conversation], None, **quiet)
        tab_inputs = [self.shown, self.words, self.language]
        tab_outputs = [self.shown, self.words, self.figures]
        for clear in (self.new_conversation.click, self.chat.clear):
            cleared = clear(chat_handler.clear, [self.conversation], chat_outputs, **quiet)
            cleared.then(attention_tab.clear, [self.language], tab_outputs, **quiet)

        # The attention is collected when the tab is selected, by the button or directly.
        select_tab = gr.update(selected="attention")
        self.show_attention.click(lambda: select_tab, None, self.tabs, **quiet)
        selected = [self.conversation, self.shown, self.language]
        self.tab["tab_attention"].select(attention_tab.show, selected, tab_outputs, **options)
        self.words.input(render, tab_inputs, self.figures, **quiet)

        self.load(None, None, self.language, js=(HERE / "page.js").read_text("utf-8"))
        self.language.input(None, self.language, js="(language) => window.owl2.choose(language)")

        # The browser translates the static texts, except the labels of tabs that are not selected.
        def translate(shown: AnswerAttention | None, word: int | None, language: str) -> list[Any]:
            labels = [gr.update(label=text(key, language)) for key in self.tab]
            return [*describe(shown, word, language), *labels]

        translated = [self.words, self.figures, *self.tab.values()]
        self.language.change(translate, tab_inputs, translated, **quiet)


def _settings(engine: Engine, limit: int) -> list[Any]:
    """The controls of `ChatSettings` after the language, with the defaults of the checkpoint."""
    defaults = engine.model.generation_config
    max_tokens = min(limit, engine.context_length)
    num_tokens = min(defaults.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, max_tokens)
    temperature = (defaults.temperature or 1.0) if defaults.do_sample else 0.0
    ranges = {
        "max_new_tokens": (1, max_tokens, num_tokens, 1),
        "temperature": (0, 2, temperature, 0.05),
        "top_p": (0.05, 1, defaults.top_p or 1.0, 0.05),
    }
    sliders = [
        gr.Slider(low, high, value, step=step, label=i18n(key), info=i18n(f"{key}_info"))
        for key, (low, high, value, step) in ranges.items()
    ]
    # gr.Number would turn an empty value into 0.
    seed = gr.Textbox("", max_lines=1, label=i18n("seed"), info=i18n("seed_info"), elem_id="seed")
    return [*sliders, seed]
