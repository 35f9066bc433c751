"""HTML pages that need no other file: a skeleton, escaped tables and embedded images."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

from owl2.errors import InputError
from owl2.processing.image_io import DEFAULT_MAX_PIXELS, load_image

THUMBNAIL_SIZE = 320  # pixels of the longer edge
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse } th, td { padding: .25em .8em; text-align: right }
th:first-child, td:first-child { text-align: left } thead { border-bottom: 2px solid #888 }
article { display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em 0 }
.images { flex: none; width: 320px } .images img { max-width: 100%; display: block }
small { color: #555; word-break: break-all } .error { color: #b00020 }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A complete document with `title` as its heading.

    Args:
        title: Plain text.
        body: HTML.
        style: CSS in addition to `STYLE`.
    """
    title = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead>\n<tbody>\n{body}\n</tbody></table>\n"


def thumbnail(image: Any, max_pixels: int = DEFAULT_MAX_PIXELS) -> str:
    """A small copy of an image within the page.

    Args:
        image: As `load_image` takes it. The browser fetches an image behind a URL itself. An image
            that cannot be read becomes its error message.
        max_pixels: As in `load_image`.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return f'<img src="{escape(image)}" alt="">'
    try:
        opened = load_image(image, max_pixels)
    except InputError as error:
        return error_text(error)
    size = f"{opened.width}×{opened.height}"
    opened.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    opened.save(data, "JPEG", quality=85)
    return f"{embed(data.getvalue(), 'image/jpeg', size)}<small>{size}</small>"


def embed(data: bytes, media_type: str, alt: str = "") -> str:
    """An `img` element that contains an encoded image."""
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:{media_type};base64,{encoded}" alt="{escape(alt)}">'


def error_text(error: InputError) -> str:
    """An error message as a paragraph."""
    return f'<p class="error">{escape(str(error))}</p>'
