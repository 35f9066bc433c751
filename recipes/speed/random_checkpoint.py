"""A checkpoint of the released size with random weights, for measurements.

::

    python recipes/speed/random_checkpoint.py FOLDER [--size 7b] [--shards 8]

It has the released layout: bfloat16 in ``pytorch_model-*.bin`` with an index, 16.4 GB for 7b. One
file is in memory at a time. The answers are meaningless.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from sentencepiece import sentencepiece_model_pb2

from owl2.bench.presets import PRESETS
from owl2.checkpoints.weight_files import COMPUTED_KEYS
from owl2.checkpoints.weight_names import released_name
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer

TEXTS = ["USER: what is this? ASSISTANT: a red circle", "yes no blue green 0123456789"] * 5
STANDARD_DEVIATION = 0.02
NUM_VALUES = 9_999_991  # random numbers; not a multiple of a row


def write(folder: Path, size: str, shards: int) -> None:
    """Write the checkpoint and its processor."""
    folder.mkdir(parents=True)
    config = Owl2Config(**PRESETS[size] | {"dtype": "bfloat16"})
    config.save_pretrained(folder)
    write_processor(folder, config)
    torch.manual_seed(0)
    values = torch.empty(NUM_VALUES, dtype=torch.bfloat16).normal_(std=STANDARD_DEVIATION)
    files: dict[str, str] = {}
    for number, names in enumerate(split(shapes_of(config), shards), 1):
        file = f"pytorch_model-{number:05}-of-{shards:05}.bin"
        tensors = {}
        for name, shape in names.items():
            if len(shape) == 1 and name.endswith("weight"):  # of a norm
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[name] = random_tensor(shape, values)
        torch.save(tensors, folder / file)
        files |= dict.fromkeys(names, file)
        print(file, flush=True)
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))


def write_processor(folder: Path, config: Owl2Config) -> None:
    """Write a processor whose tokenizer has as many tokens as the model; most are unused."""
    file = folder / "tokenizer.model"
    train_tokenizer(TEXTS, file, 320)
    tokenizer = sentencepiece_model_pb2.ModelProto()
    tokenizer.ParseFromString(file.read_bytes())
    for number in range(len(tokenizer.pieces), config.vocab_size):
        tokenizer.pieces.add(piece=f"<unused{number}>", score=-number)
    file.write_bytes(tokenizer.SerializeToString())
    Owl2Processor(
        Owl2ImageProcessor(config.image_size),
        Owl2Tokenizer(file),
        num_image_tokens=config.num_image_tokens,
        image_token_id=config.image_token_id,
    ).save_pretrained(folder)


def random_tensor(shape: torch.Size, values: torch.Tensor) -> torch.Tensor:
    """`values`, repeated from a random position: much faster than as many random numbers."""
    tensor = torch.empty(shape.numel(), dtype=values.dtype)
    start = int(torch.randint(len(values), ()))
    for part in tensor.split(len(values)):
        part.copy_(torch.cat([values[start:], values[:start]])[: len(part)])
    return tensor.view(shape)


def shapes_of(config: Owl2Config) -> dict[str, torch.Size]:
    """The shapes of all learned tensors by their released names."""
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(config)
    return {
        released_name(name): tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.endswith(COMPUTED_KEYS)
    }


def split(shapes: dict[str, torch.Size], parts: int) -> Iterator[dict[str, torch.Size]]:
    """`parts` groups of successive tensors of about equal size."""
    share = sum(shape.numel() for shape in shapes.values()) / parts
    groups: list[dict[str, torch.Size]] = [{} for _ in range(parts)]
    done = 0
    for name, shape in shapes.items():
        groups[min(parts - 1, int(done / share))][name] = shape
        done += shape.numel()
    yield from groups


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="7b", choices=sorted(PRESETS))
    parser.add_argument("--shards", type=int, default=8)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists")
    write(options.folder, options.size, options.shards)
