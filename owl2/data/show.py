"""`owl2 data show`: samples as the model gets them, on the terminal."""

from collections.abc import Sequence
from itertools import islice

from rich.console import Console
from rich.text import Text

from owl2.data.sample import Bad
from owl2.data.shards import Shards
from owl2.data.sources import open_words
from owl2.processing.processor import Owl2Processor


def show(
    model: str, source: str, settings: Sequence[str], count: int, console: Console | None = None
) -> None:
    """Print the first `count` samples; words that are learned are green, all others dim.

    `model`: the checkpoint (or hub id) whose processor is used. `source` and `settings`: see
    `open_words`.

    Raises:
        InputError: no processor in `model`, or see `open_words`.
    """
    console = console or Console()
    samples = open_words(source, settings)
    processor = Owl2Processor.from_pretrained(model)
    first = list(islice(samples, count))
    for sample in first:
        console.print(Text(sample.source, "bold"))
        if isinstance(sample, Bad):
            console.print(Text(f"left out: {sample.reason}", "red"), soft_wrap=True)
        else:
            console.print(processor.show_labels(sample.messages), soft_wrap=True)
        console.print()
    total = "the" if isinstance(samples, Shards) else f"{len(samples):,}"
    summary = Text(f"{len(first):,} of {total} samples; ")
    console.print(summary + Text("green is learned", "bold green") + Text(", the rest is given"))
