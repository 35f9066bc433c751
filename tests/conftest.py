"""Fixtures of all tests. Tests do not use the network: a hub request fails immediately."""

import functools
import gc
import os
import ssl
import subprocess
import sys
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it
os.environ["TQDM_DISABLE"] = "1"  # a part of the time to load a tiny model

import pytest

from tests.cli import run_cli  # noqa: F401  # a fixture of all tests

collect_ignore = ["clients"]  # `make test-clients` runs them in an environment of their own


def pytest_collection_finish():
    """Exclude the imported modules from garbage collection, which runs at the end of each
    training run and would otherwise take longer than the run."""
    gc.freeze()


@pytest.fixture(autouse=True)
def reject_truncated_images(monkeypatch):
    """Importing lmms-eval sets Pillow to accept truncated images in the complete process."""
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture
def cpu_capabilities(monkeypatch):
    """Sets the instructions that torch reports, e.g. ``cpu_capabilities(avx512_bf16=True)``."""
    import torch

    from owl2.runtime import cpu_supports_amx, cpu_supports_bf16, cpu_supports_fp16

    def clear_caches():
        for function in (cpu_supports_amx, cpu_supports_bf16, cpu_supports_fp16):
            function.cache_clear()

    def set_capabilities(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        clear_caches()

    yield set_capabilities
    clear_caches()


@pytest.fixture(scope="session", autouse=True)
def read_certificates_once():
    """Each client of httpx would read them again, which takes 40 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A read-only directory with the untrained tiny model and a processor."""
    # Imported here, because importing transformers takes seconds and most tests do not need it.
    from owl2.processing.image_processing import Owl2ImageProcessor
    from owl2.processing.processor import Owl2Processor
    from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
    from tests.tiny import make_model

    directory = tmp_path_factory.mktemp("tiny_checkpoint")
    texts = ["USER: what is this? ASSISTANT: a red circle", "yes no blue green", "你好 🦉"] * 5
    train_tokenizer(texts, directory / "tokenizer.model", 320)
    tokenizer = Owl2Tokenizer(directory / "tokenizer.model")
    # Large weights, so that answers depend on the prompt and no two logits are close.
    model = make_model(
        vocab_size=len(tokenizer), initializer_range=0.4, max_position_embeddings=128
    )
    model.save_pretrained(directory)
    processor = Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def other_process_in():
    """A process that uses an output directory (`exclusive_directory`) until it is killed."""

    @contextmanager
    def running(directory):
        # As a command, owl2 does not import transformers, which takes seconds.
        code = "import sys\nsys.argv[0] = 'owl2'\nfrom owl2.files import *"
        code += "\nwith exclusive_directory(Path(sys.argv[1])):\n    print(flush=True)\n    input()"
        command = [sys.executable, "-c", code, str(directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            yield
            process.kill()

    return running
