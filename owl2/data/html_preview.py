"""Samples as one HTML page: the images beside the words, for whoever would rather look."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image
from rich.text import Text

from owl2.data.sample import Bad, Sample
from owl2.errors import InputError
from owl2.processing.chat_template import read_messages
from owl2.processing.image_processing import DEFAULT_MAX_PIXELS, load_image
from owl2.processing.loss_mask import LEARNED_STYLE
from owl2.processing.processor import Owl2Processor

EDGE = 320  # pixels of an image's longer edge on the page
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
article { display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em 0 }
.images { flex: none; width: 320px }
.images img { max-width: 100%; display: block; margin-bottom: .5em }
h2 { font-size: .85em; color: #555; font-weight: normal; margin: 0 0 .5em; word-break: break-all }
.words { white-space: pre-wrap; overflow-wrap: anywhere; color: #666 }
.learned { color: #06661f; background: #e3f6e7; font-weight: 600 }
.bad { color: #b00020 }
small { color: #555; word-break: break-all }
"""


def page(samples: Sequence[Sample | Bad], processor: Owl2Processor, title: str) -> str:
    """HTML that needs no other file: images are in it, small. What is learned is green."""
    articles = "\n".join(_article(sample, processor) for sample in samples)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n"
        '<p><span class="learned">Green</span> is learned, the rest is given.</p>\n'
        f"{articles}\n</body></html>\n"
    )


def _article(sample: Sample | Bad, processor: Owl2Processor) -> str:
    images = ""
    try:
        if isinstance(sample, Bad):
            raise sample.raised()
        found = read_messages(sample.messages).images
        max_pixels = processor.image_processor.max_pixels
        images = "\n".join(figure(image, max_pixels) for image in found)
        words = _words(processor.show_labels(sample.messages))
    except InputError as error:
        words = _bad(error)
    return (
        f'<article><div class="images">{images}</div>\n'
        f'<div><h2>{escape(sample.source)}</h2><div class="words">{words}</div></div></article>'
    )


def figure(image: Any, max_pixels: int = DEFAULT_MAX_PIXELS) -> str:
    """An image, small; one behind a URL stays there, for the browser to fetch."""
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return f'<img src="{escape(image)}" alt="">'
    try:
        opened = load_image(image, max_pixels)
    except InputError as error:
        return _bad(error)
    size = f"{opened.width}×{opened.height}"
    opened.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    opened.save(data, "JPEG", quality=85)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{encoded}" alt="{size}"><small>{size}</small>'


def _words(text: Text) -> str:
    pieces = []
    for span in text.spans:
        piece = escape(text.plain[span.start : span.end])
        learned = span.style == LEARNED_STYLE
        pieces.append(f'<span class="learned">{piece}</span>' if learned else piece)
    return "".join(pieces)


def _bad(error: InputError) -> str:
    return f'<p class="bad">{escape(str(error))}</p>'
