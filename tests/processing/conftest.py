"""Tokenizers and processors: the golden one, and two that the tests create."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, add_image_token, train_tokenizer
from tests.processing.samples import TEXTS

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def golden_text() -> dict:
    return json.loads((GOLDEN / "text" / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def llama_file() -> Path:
    """The SentencePiece file that golden/text was made with; its package is not imported."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec and spec.submodule_search_locations, "install the extra [dev]: mistral-common"
    return Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="session")
def llama(llama_file) -> Owl2Tokenizer:
    """For all tests, as it takes a while to load: a test that changes it makes its own."""
    tokenizer = Owl2Tokenizer(llama_file)
    add_image_token(tokenizer)
    return tokenizer


@pytest.fixture
def processor(llama) -> Owl2Processor:
    """K = 5 as in golden/model_mha, so an image takes 6 places."""
    return Owl2Processor(Owl2ImageProcessor(56), llama, num_image_tokens=6)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.model"
    train_tokenizer(TEXTS, path, 320)
    return path


@pytest.fixture
def byte_level() -> PreTrainedTokenizerFast:
    """A fast tokenizer of another family (byte-level BPE, nothing before a text), as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, *["a\n\n\nb"] * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (20, 10), (200, 30, 60))
