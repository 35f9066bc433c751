"""Samples as an HTML page with their images, tokens with a label highlighted."""

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
.text { white-space: pre-wrap; overflow-wrap: anywhere; color: #666 }
.label { color: #06661f; background: #e3f6e7; font-weight: 600 }
"""


def sample_page(
    samples: Sequence[Sample | InvalidSample], processor: Owl2Processor, title: str
) -> str:
    """An HTML page that needs no other file; the images are embedded as thumbnails."""
    articles = "\n".join(_article(sample, processor) for sample in samples)
    legend = '<p><span class="label">Green</span> tokens contribute to the loss.</p>\n'
    return html.page(title, legend + articles, _STYLE)


def _article(sample: Sample | InvalidSample, processor: Owl2Processor) -> str:
    images = ""
    try:
        if isinstance(sample, InvalidSample):
            raise sample.to_error()
        max_pixels = processor.image_processor.max_pixels
        sources = parse_messages(sample.messages).images
        images = "\n".join(html.thumbnail(image, max_pixels) for image in sources)
        text = _spans(processor.show_labels(sample.messages))
    except InputError as error:
        text = html.error_text(error)
    return (
        f'<article><div class="images">{images}</div>\n'
        f'<div><h2>{escape(sample.source)}</h2><div class="text">{text}</div></div></article>'
    )


def _spans(text: Text) -> str:
    spans = []
    for span in text.spans:
        content = escape(text.plain[span.start : span.end])
        is_label = span.style == LABEL_STYLE
        spans.append(f'<span class="label">{content}</span>' if is_label else content)
    return "".join(spans)
