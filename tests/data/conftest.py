"""Fixtures of the data tests: a processor with a small vocabulary, and an image."""

from pathlib import Path

import pytest
from PIL import Image

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer

IMAGE_TOKENS = 5


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = ["USER: what color is the circle?", " ASSISTANT: red", "a blue rectangle. yes no"]
    train_tokenizer(texts, path, 320)
    return path


@pytest.fixture
def processor(tokenizer_file) -> Owl2Processor:
    images = Owl2ImageProcessor(size=8)
    return Owl2Processor(images, Owl2Tokenizer(tokenizer_file), num_image_tokens=IMAGE_TOKENS)


@pytest.fixture
def image(tmp_path) -> Path:
    """12×8 pixels, each with a different color."""
    path = tmp_path / "image.png"
    new = Image.new("RGB", (12, 8))
    new.putdata([(x * 20, y * 30, x * y) for y in range(8) for x in range(12)])
    new.save(path)
    return path
