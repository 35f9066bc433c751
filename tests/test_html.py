"""HTML pages: everything is escaped, and images are embedded."""

import base64
import io
import re

import pytest
from PIL import Image

from owl2 import html


def test_page_escapes_its_title():
    text = html.page("a <b> & c", "<p>body</p>", "p { color: red }")
    assert text.count("a &lt;b&gt; &amp; c") == 2
    assert "<b>" not in text
    assert "<p>body</p>" in text
    assert "p { color: red }" in text


def test_table_escapes_its_cells():
    text = html.table(("name", "<n>"), [("a", "1"), ("<script>", "2")])
    assert text.count("<th>") == 2
    assert text.count("<td>") == 4
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


def test_thumbnail_is_small_and_gives_the_original_size():
    text = html.thumbnail(Image.new("RGB", (1000, 500), "red"))
    encoded = re.search(r'src="data:image/jpeg;base64,([^"]+)"', text).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (320, 160)
    assert "1000×500" in text


def test_thumbnail_of_a_url_is_fetched_by_the_browser():
    url = "https://example.org/a.jpg?x=1&y=2"
    assert html.thumbnail(url) == '<img src="https://example.org/a.jpg?x=1&amp;y=2" alt="">'


@pytest.mark.parametrize("name", ["missing.png", "<missing>.png"])
def test_unreadable_image_becomes_an_error_message(tmp_path, name):
    text = html.thumbnail(str(tmp_path / name))
    assert text.startswith('<p class="error">')
    assert "missing" in text
    assert "<missing>" not in text
