"""`owl2 data show`: samples as the model gets them, on the terminal."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from owl2.data.datasets import load_dataset
from owl2.data.readers import is_sample_file, read_file
from owl2.data.sample import Sample
from owl2.errors import InputError
from owl2.processing.processor import Owl2Processor


def show(
    model: str, source: str, settings: Sequence[str], count: int, console: Console | None = None
) -> None:
    """Print the first `count` samples; words that are learned are green, all others dim.

    `model`: the checkpoint (or hub id) whose processor is used. `source` and `settings`: see
    `open_source`.

    Raises:
        InputError: no processor in `model`, or see `open_source`.
    """
    console = console or Console()
    samples = open_source(source, settings)
    processor = Owl2Processor.from_pretrained(model)
    for sample in islice(samples, count):
        console.print(Text(sample.source, "bold"))
        console.print(processor.show_labels(sample.messages), soft_wrap=True)
        console.print()
    shown = Text(f"{min(count, len(samples)):,} of {len(samples):,} samples; ")
    console.print(shown + Text("green is learned", "bold green") + Text(", the rest is given"))


def open_source(source: str, settings: Sequence[str]) -> Sequence[Sample]:
    """A dataset's name or a file, with `key=value` settings, → its Samples.

    A dataset takes `split` and its own options; a file takes `images`, the directory that its
    picture paths start from. Values are read as YAML.

    Raises:
        InputError: a setting without `=` or that the source does not have; an unknown source.
    """
    options = dict(_setting(setting) for setting in settings)
    if not is_sample_file(source):
        split = options.pop("split", "train")
        return load_dataset(source, split, **options)
    images = options.pop("images", None)
    if options:
        raise InputError(f"A file has the setting 'images' only, not {', '.join(options)}.")
    return read_file(source, None if images is None else str(images))


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InputError(f"{text!r} must have the form option=value.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r}: the value cannot be read: {error}") from error
