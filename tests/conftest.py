"""Tests make what they need. They never reach for the network: a hub look-up fails at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so set before it

import pytest

from tests.cli import run_cli  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def broken_images_are_broken(monkeypatch):
    """Importing lmms-eval tells Pillow, for all the process, to take half an image for a whole."""
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A directory with the tiny model and a processor, untrained; for reading only."""
    # Imported here, as most tests do without and transformers takes seconds.
    from owl2.processing.image_processing import Owl2ImageProcessor
    from owl2.processing.processor import Owl2Processor
    from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
    from tests.tiny import make_model

    directory = tmp_path_factory.mktemp("tiny_checkpoint")
    texts = ["USER: what is this? ASSISTANT: a red circle", "yes no blue green", "你好 🦉"] * 5
    train_tokenizer(texts, directory / "tokenizer.model", 320)
    tokenizer = Owl2Tokenizer(directory / "tokenizer.model")
    # Weights far from 0, so that answers differ from prompt to prompt and no two logits are close.
    model = make_model(
        vocab_size=len(tokenizer), initializer_range=0.4, max_position_embeddings=128
    )
    model.save_pretrained(directory)
    processor = Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3)
    processor.save_pretrained(directory)
    return directory
