"""`owl2 data show`: samples as the model reads them, on the terminal or as a page with images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.text import Text

from owl2 import html as html_page
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample, Sample, get_or_invalid
from owl2.data.webdataset import TarDataset
from owl2.errors import InputError
from owl2.files import atomic_write_text
from owl2.processing.image_io import load_image
from owl2.processing.labeling import show_labels
from owl2.processing.loss_mask import LABEL_STYLE
from owl2.processing.messages import parse_messages
from owl2.processing.prepared_prompt import images_of
from owl2.processing.processor import Owl2Processor
from owl2.processing.video import SampledFrame

# Enclose the tokens with a label where colors are not available.
BEGIN, END = "⟦", "⟧"
SHUFFLE_BUFFER = 1000  # samples of shards

HTML_STYLE = """
.images img { margin-bottom: .5em }
h2 { font-size: .85em; color: #555; font-weight: normal; margin: 0 0 .5em; word-break: break-all }
.text { white-space: pre-wrap; overflow-wrap: anywhere; color: #666 }
.label { color: #06661f; background: #e3f6e7; font-weight: 600 }
"""


def show_samples(
    model: str,
    datasets: Mapping[str, SampleDataset],
    count: int,
    console: Console | None = None,
    *,
    chat_template: str | None = None,
    start: int = 0,
    seed: int | None = None,
    html: str | Path | None = None,
) -> None:
    """Prints samples. Tokens with a label are green, or between ⟦ and ⟧ without colors.

    Args:
        model: The checkpoint or hub id whose processor is used.
        datasets: By their names.
        chat_template: As in `Owl2Processor.from_pretrained`.
        count: Number of samples of each dataset, from number `start` on (from 0).
        seed: Shuffles the samples; None keeps their order.
        html: Write a page with the images to this file instead.

    Raises:
        InputError: `model` has no processor, or `html` cannot be written.
    """
    console = console or Console()
    processor = Owl2Processor.from_pretrained(
        model,
        chat_template=chat_template,
        image_newline=True,  # as in training
    )
    samples = (
        sample
        for dataset in datasets.values()
        for sample in islice(_ordered(dataset, start + count, seed), start, start + count)
    )
    sizes = [None if isinstance(d, TarDataset) else len(d) for d in datasets.values()]
    total = "the" if None in sizes else f"{sum(filter(None, sizes)):,}"
    if html is not None:
        articles = [_article(sample, processor) for sample in samples]
        legend = '<p><span class="label">Green</span> tokens contribute to the loss.</p>\n'
        title = f"{len(articles):,} of {total} samples of {', '.join(datasets)}"
        atomic_write_text(html, html_page.page(title, legend + "\n".join(articles), HTML_STYLE))
        console.print(f"Wrote {len(articles):,} samples to {html}", markup=False, soft_wrap=True)
        return
    has_colors = console.is_terminal and console.color_system is not None
    number = 0
    for sample in samples:
        number += 1
        _print_sample(console, sample, processor, has_colors)
    legend_text = Text("Green", LABEL_STYLE) if has_colors else Text(f"{BEGIN}Marked{END}")
    summary = Text(f"{number:,} of {total} samples. ")
    console.print(summary + legend_text + " tokens contribute to the loss.")


def _ordered(
    dataset: SampleDataset, count: int, seed: int | None
) -> Iterator[Sample | InvalidSample]:
    """At least the first `count` samples."""
    if isinstance(dataset, TarDataset):
        if seed is None:
            yield from dataset
        else:
            stream = dataset.stream(seed=seed, shuffle_buffer=SHUFFLE_BUFFER)
            yield from (sample for sample, _ in stream)
        return
    rows: Sequence[int] = range(len(dataset))
    if seed is not None:
        rows = Random(seed).sample(rows, min(count, len(rows)))
    yield from (get_or_invalid(dataset, row) for row in rows)


def _content(
    sample: Sample | InvalidSample, processor: Owl2Processor
) -> tuple[Sequence[Any], Text | InputError]:
    """The images of a sample, and its text with the labels in `LABEL_STYLE` or its error."""
    if isinstance(sample, InvalidSample):
        return (), InputError(sample.reason, sample.code)
    images: Sequence[Any] = ()
    try:
        images = images_of(parse_messages(sample.messages), processor.num_frames)
        return images, show_labels(processor, sample.messages)
    except InputError as error:
        return images, error


def _marked(text: Text, begin: str, end: str, convert: Callable[[str], str] = str) -> str:
    """The text with `begin` and `end` around the tokens with a label."""
    segments = []
    for span in text.spans:
        content = convert(text.plain[span.start : span.end])
        segments.append(f"{begin}{content}{end}" if span.style == LABEL_STYLE else content)
    return "".join(segments)


# ------------------------------------------------------------------ terminal


def _print_sample(
    console: Console, sample: Sample | InvalidSample, processor: Owl2Processor, has_colors: bool
) -> None:
    images, text = _content(sample, processor)
    lines = [Text(sample.source, "bold")]
    for number, image in enumerate(images, start=1):
        lines.append(Text(f"image {number}: ") + _describe(image, processor))
    if isinstance(text, InputError):
        lines.append(Text(f"invalid: {text}", "red"))
    else:
        lines.append(text if has_colors else Text(_marked(text, BEGIN, END)))
    for line in [*lines, Text()]:
        console.print(line, soft_wrap=True)


def _describe(image: Any, processor: Owl2Processor) -> Text:
    """The path and size of an image. Images behind URLs are not fetched."""
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return Text(image)
    has_path = isinstance(image, (str, Path, SampledFrame)) and not str(image).startswith("data:")
    try:
        width, height = load_image(image, processor.image_processor.max_pixels).size
    except InputError as error:
        return Text(str(error), "red")
    return Text(f"{image}, {width}×{height}" if has_path else f"{width}×{height}")


# ------------------------------------------------------------------ page


def _article(sample: Sample | InvalidSample, processor: Owl2Processor) -> str:
    images, text = _content(sample, processor)
    max_pixels = processor.image_processor.max_pixels
    thumbnails = "\n".join(html_page.thumbnail(image, max_pixels) for image in images)
    if isinstance(text, InputError):
        body = html_page.error_text(text)
    else:
        body = _marked(text, '<span class="label">', "</span>", escape)
    return (
        f'<article><div class="images">{thumbnails}</div>\n'
        f'<div><h2>{escape(sample.source)}</h2><div class="text">{body}</div></div></article>'
    )
