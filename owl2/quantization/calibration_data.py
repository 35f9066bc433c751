"""Calibration samples as model inputs: datasets of the command line, or text that Python contains.

The text is the language reference that Python's `help` shows, so it is on every machine.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch

from owl2.data.open_dataset import open_from_cli
from owl2.data.sample import InvalidSample, Sample
from owl2.errors import error_prefix
from owl2.processing.processor import Owl2Processor

PYTHON_REFERENCE = "python_reference"  # the name of the built-in text
CHARACTERS = 8  # of a token, at most on average
Inputs = Mapping[str, torch.Tensor]


def calibration_inputs(
    sources: Sequence[str], processor: Owl2Processor, num_samples: int, max_length: int
) -> Iterator[Inputs]:
    """Arguments of the model for each sample, in batches of one.

    Args:
        sources: Datasets, see `open_from_cli`, or "python_reference" for the built-in text. Each
            provides the same number of samples, if it has that many.
        num_samples: In total.
        max_length: Tokens of a sample.

    Raises:
        InputError: A source cannot be opened; a row or an image in it cannot be read; an image
            ends after `max_length`.
    """
    count = -(-num_samples // len(sources))
    for source in sources:
        if source == PYTHON_REFERENCE:
            yield from islice(_text_inputs(processor, count, max_length), count)
            continue
        dataset = open_from_cli(source)
        # Rows at equal distances; a stream of shards has no length.
        step = max(1, len(dataset) // count) if isinstance(dataset, Sequence) else 1
        for sample in islice(dataset, 0, count * step, step):
            yield _sample_inputs(sample, processor, max_length)


def _sample_inputs(
    sample: Sample | InvalidSample, processor: Owl2Processor, max_length: int
) -> Inputs:
    if isinstance(sample, InvalidSample):
        raise sample.to_error()
    with error_prefix(f"{sample.source}: "):
        features = processor.for_training(sample.messages, max_length)
    return {name: value for name, value in features.items() if name != "labels"}


def _text_inputs(processor: Owl2Processor, count: int, max_length: int) -> Iterator[Inputs]:
    """Chunks of the built-in text at equal distances."""
    from pydoc_data.topics import topics  # 0.5 MB

    start = processor(text=[""])["input_ids"][0]
    text = "\n\n".join(topics.values())
    width = CHARACTERS * max_length
    for position in range(0, len(text), max(width // 2, len(text) // count)):
        chunk = text[position : position + width]
        ids = start + processor.tokenizer(chunk, add_special_tokens=False)["input_ids"]
        yield {"input_ids": torch.tensor([ids[:max_length]])}
