"""Fixtures for tests of training."""

import json

import pytest
from PIL import Image

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from owl2.train.recipe import Recipe
from tests.cli import run_cli  # noqa: F401  # a fixture
from tests.tiny import make_model
from tests.train.tiny import COLORS, QUESTION, ROWS, SMALL_RUN


@pytest.fixture
def make_recipe(tmp_path):
    """Recipes of a `Owl2Trainer` whose model and data are not read from files."""
    unread = {"model": "unused", "data": [{"dataset": "unused"}], "output": str(tmp_path / "run")}
    own = {"max_steps": 4, "warmup_steps": 0, "min_lr": 1e-4, "logging_steps": 1}
    return lambda **settings: Recipe(**SMALL_RUN | unread | own | settings)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with an untrained checkpoint, images of one color each, and conversations."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for number in range(ROWS):
        color = COLORS[number % len(COLORS)]
        Image.new("RGB", (10, 10), color).save(folder / f"{number}.png")
        answer = " ".join([color] * (1 + number % 3))
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    checkpoint = folder / "start"
    checkpoint.mkdir()
    texts = [f"USER: \n{QUESTION} ASSISTANT: {color}" for color in COLORS] * 10
    train_tokenizer(texts, checkpoint / "tokenizer.model", 300)
    tokenizer = Owl2Tokenizer(str(checkpoint / "tokenizer.model"))
    model = make_model(vocab_size=len(tokenizer))
    model.save_pretrained(checkpoint)
    processor = Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3)
    processor.save_pretrained(checkpoint)
    return folder


@pytest.fixture
def recipe(world, tmp_path):
    """Recipes of runs in `world`."""
    files = {"model": str(world / "start"), "data": [{"file": str(world / "data.json")}]}
    own = {"output": str(tmp_path / "run"), "augment": "dihedral", "max_steps": 10}
    return lambda **settings: Recipe(**SMALL_RUN | files | own | settings)
