"""What the server says beside the conversation, in a corner of the page, for some seconds."""

import html

import gradio as gr

from owl2.serve.errors import as_api_error
from owl2.serve.web.i18n import error_text, text


def note(key: str, language: str) -> None:
    """Say the words of a key."""
    gr.Info(text(key, language))


def warn(error: Exception, language: str) -> None:
    """Say an error; what is no code of the visitor's goes to the log."""
    words = html.escape(error_text(as_api_error(error), language))  # the page takes it as HTML
    gr.Warning(words)
