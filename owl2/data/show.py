"""`owl2 data show`: samples as the model gets them, on the terminal or as a page with images."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.text import Text

from owl2.data.html_preview import page
from owl2.data.open_dataset import SampleDataset, open_from_cli
from owl2.data.sample import InvalidSample, Sample, get_or_invalid
from owl2.data.webdataset import TarDataset
from owl2.errors import InputError
from owl2.files import atomic_write_text
from owl2.processing.chat_template import parse_messages
from owl2.processing.image_io import load_image
from owl2.processing.loss_mask import LABEL_STYLE
from owl2.processing.processor import Owl2Processor

# Around learned words where there is no colour.
BEGIN, END = "⟦", "⟧"
# SampleDataset of shards that are held to be drawn from.
WINDOW = 1000


def show(
    model: str,
    source: str,
    settings: Sequence[str],
    count: int,
    console: Console | None = None,
    *,
    start: int = 0,
    seed: int | None = None,
    html: str | Path | None = None,
) -> None:
    """Print samples; words that are learned are green, or between ⟦ and ⟧ where there is no colour.

    `model`: the checkpoint (or hub id) whose processor is used. `source` and `settings`: see
    `open_from_cli`. `count` samples from number `start` on (from 0), in order, or with a `seed` in one
    that it draws. `html`: a file that becomes a page with the images, instead.

    Raises:
        InputError: no processor in `model`, `html` cannot be written, or see `open_from_cli`.
    """
    console = console or Console()
    samples = open_from_cli(source, settings)
    processor = Owl2Processor.from_pretrained(model)
    chosen = islice(_in_order(samples, start + count, seed), start, start + count)
    total = "the" if isinstance(samples, TarDataset) else f"{len(samples):,}"
    if html is not None:
        shown = list(chosen)
        atomic_write_text(
            html, page(shown, processor, f"{len(shown):,} of {total} samples of {source}")
        )
        console.print(f"{len(shown):,} samples are in {html}", markup=False, soft_wrap=True)
        return
    number = 0
    for sample in chosen:
        _print(console, sample, processor)
        number += 1
    learned = Text(f"{BEGIN}this{END} is learned")
    if _has_colours(console):
        learned = Text("green is learned", LABEL_STYLE)
    console.print(Text(f"{number:,} of {total} samples; ") + learned + ", the rest is given")


def _in_order(
    samples: SampleDataset, wanted: int, seed: int | None
) -> Iterator[Sample | InvalidSample]:
    """The first `wanted`, or more of them."""
    if isinstance(samples, TarDataset):
        if seed is None:
            yield from samples
        else:
            yield from (sample for sample, _ in samples.stream(seed=seed, shuffle_buffer=WINDOW))
        return
    size = len(samples)
    places: Sequence[int] = range(size)
    if seed is not None:
        places = Random(seed).sample(places, min(wanted, size))
    yield from (get_or_invalid(samples, place) for place in places)


def _print(console: Console, sample: Sample | InvalidSample, processor: Owl2Processor) -> None:
    def say(text: Text) -> None:
        console.print(text, soft_wrap=True)

    say(Text(sample.source, "bold"))
    try:
        if isinstance(sample, InvalidSample):
            raise sample.to_error()
        for number, image in enumerate(parse_messages(sample.messages).images, start=1):
            max_pixels = processor.image_processor.max_pixels
            say(Text(f"image {number}: ") + _described(image, max_pixels))
        say(_marked(processor.show_labels(sample.messages), console))
    except InputError as error:
        say(Text(f"bad: {str(error).removeprefix(f'{sample.source}: ')}", "red"))
    console.print()


def _described(image: Any, max_pixels: int) -> Text:
    """Where an image is, and its size; one behind a URL is not fetched."""
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return Text(image)
    named = isinstance(image, (str, Path)) and not str(image).startswith("data:")
    try:
        width, height = load_image(image, max_pixels).size
    except InputError as error:
        return Text(str(error), "red")
    return Text(f"{image}, {width}×{height}" if named else f"{width}×{height}")


def _has_colours(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None


def _marked(text: Text, console: Console) -> Text:
    """The same; where colours do not show, with brackets around what is learned."""
    if _has_colours(console):
        return text
    marked = text.plain
    for span in reversed(text.spans):
        if span.style == LABEL_STYLE:
            inside = marked[span.start : span.end]
            marked = f"{marked[: span.start]}{BEGIN}{inside}{END}{marked[span.end :]}"
    return Text(marked)
