"""A checkpoint for vLLM's CPU kernels (head size 32), one vLLM for all tests, and the `Engine` that
gives the expected tokens.

Starting vLLM takes most of the time, so the tests share one with difficult settings: steps of 24
tokens for prompts of up to 100, which splits images of 11 tokens anywhere, and prefix caching.
"""

import os
from contextlib import contextmanager

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest
import torch

from tests.engine.conftest import ask, random_image

QUERIES = 10
STEP = 24


def make_checkpoint(directory, **settings):
    """A checkpoint in `directory`, whose visual weights differ from the text weights."""
    from owl2.processing.image_processing import Owl2ImageProcessor
    from owl2.processing.processor import Owl2Processor
    from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
    from tests.tiny import make_model

    texts = ["USER: what is this? ASSISTANT: a red circle", "yes no blue green", "你好 🦉"] * 5
    train_tokenizer(texts, directory / "tokenizer.model", 320)
    tokenizer = Owl2Tokenizer(directory / "tokenizer.model")
    sizes = {"hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 256}
    model = make_model(
        vocab_size=len(tokenizer),
        initializer_range=0.4,
        abstractor={"num_learnable_queries": QUERIES},
        **sizes | settings,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".multiway." in name and weight.dim() == 1:
                weight.uniform_(0.3, 1.7, generator=generator)
            elif ".multiway.1." in name:
                weight.normal_(0, 0.4, generator=generator)
    model.save_pretrained(directory)
    processor = Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=QUERIES + 1)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("vllm_checkpoint"))


@pytest.fixture(scope="session")
def engine(checkpoint):
    from owl2.engine.engine import Engine

    return Engine.from_pretrained(
        checkpoint, device="cpu", dtype="float32", enable_prefix_caching=False
    )


@pytest.fixture(scope="session")
def llm(checkpoint):
    with start_vllm(checkpoint) as llm:
        yield llm


@contextmanager
def start_vllm(checkpoint, **settings):
    """A vLLM whose processes end with the block."""
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "max_num_seqs": 16,
        "max_num_batched_tokens": STEP,
        "block_size": 32,  # required by the CPU kernels
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "disable_log_stats": True,
    }
    llm = LLM(str(checkpoint), **defaults | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def conversations():
    """16 conversations with 0 to 3 images and different lengths, some with earlier turns."""
    texts = ["what is this?", "is it red? " * 5, "no", "a blue  circle\nand a green one, 你好"]
    many = [ask(text, *map(random_image, range(count))) for text in texts for count in (0, 1, 2, 3)]
    many[1] = [
        *many[1],
        {"role": "assistant", "content": "red"},
        *ask("and now?", random_image(7)),
    ]
    many[4] = [*many[4], {"role": "assistant", "content": "a circle"}, *ask("what color?")]
    return many


NEW = 12  # tokens of an answer


def engine_tokens(engine, messages):
    """The greedy tokens of the `Engine` for one conversation."""
    from owl2.engine.sampling_params import SamplingParams

    prompt = engine.encode(messages)
    params = SamplingParams(max_new_tokens=NEW)
    return engine.core.generate([prompt], params, [NEW], engine.end_ids)[0]


def vllm_tokens(llm, many, **options):
    """The greedy tokens of vLLM for several conversations in one call of its chat method."""
    from vllm import SamplingParams

    chats = [[_for_vllm(message) for message in messages] for messages in many]
    params = SamplingParams(temperature=0, max_tokens=NEW)
    outputs = llm.chat(chats, params, use_tqdm=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _for_vllm(message):
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}
