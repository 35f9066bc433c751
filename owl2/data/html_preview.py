"""Samples as one HTML page: the images beside the words, for whoever would rather look."""

from collections.abc import Sequence
from html import escape

from rich.text import Text

from owl2 import html
from owl2.data.sample import InvalidSample, Sample
from owl2.errors import InputError
from owl2.processing.chat_template import parse_messages
from owl2.processing.loss_mask import LABEL_STYLE
from owl2.processing.processor import Owl2Processor

_STYLE = """
.images img { margin-bottom: .5em }
h2 { font-size: .85em; color: #555; font-weight: normal; margin: 0 0 .5em; word-break: break-all }
.words { white-space: pre-wrap; overflow-wrap: anywhere; color: #666 }
.learned { color: #06661f; background: #e3f6e7; font-weight: 600 }
"""


def page(samples: Sequence[Sample | InvalidSample], processor: Owl2Processor, title: str) -> str:
    """HTML that needs no other file: images are in it, small. What is learned is green."""
    articles = "\n".join(_article(sample, processor) for sample in samples)
    legend = '<p><span class="learned">Green</span> is learned, the rest is given.</p>\n'
    return html.page(title, legend + articles, _STYLE)


def _article(sample: Sample | InvalidSample, processor: Owl2Processor) -> str:
    images = ""
    try:
        if isinstance(sample, InvalidSample):
            raise sample.to_error()
        found = parse_messages(sample.messages).images
        max_pixels = processor.image_processor.max_pixels
        images = "\n".join(html.thumbnail(image, max_pixels) for image in found)
        words = _words(processor.show_labels(sample.messages))
    except InputError as error:
        words = html.error_text(error)
    return (
        f'<article><div class="images">{images}</div>\n'
        f'<div><h2>{escape(sample.source)}</h2><div class="words">{words}</div></div></article>'
    )


def _words(text: Text) -> str:
    pieces = []
    for span in text.spans:
        piece = escape(text.plain[span.start : span.end])
        learned = span.style == LABEL_STYLE
        pieces.append(f'<span class="learned">{piece}</span>' if learned else piece)
    return "".join(pieces)
