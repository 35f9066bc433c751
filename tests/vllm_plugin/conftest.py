"""A checkpoint that vLLM's CPU kernels take (heads of 32 numbers), one vLLM for all tests, and the
Engine whose tokens it must give.

Starting vLLM takes most of the time, so there is one, made for what is hard: 24 tokens a step for
prompts of up to 100, so that images of 11 tokens are cut anywhere, and prefixes are kept.
"""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest
import torch
from PIL import Image

QUERIES = 10
STEP = 24


def make_checkpoint(directory, **settings):
    """A checkpoint in `directory`, whose visual weights are nothing like the text ones."""
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
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".multiway." in name and weight.dim() == 1:
                weight.uniform_(0.3, 1.7, generator=numbers)
            elif ".multiway.1." in name:
                weight.normal_(0, 0.4, generator=numbers)
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
    with running(checkpoint) as made:
        yield made


class running:
    """A vLLM that is shut down at the end, with its processes."""

    def __init__(self, checkpoint, **settings):
        from vllm import LLM

        small = {
            "dtype": "float32",
            "max_num_seqs": 16,
            "max_num_batched_tokens": STEP,
            "block_size": 32,  # what the CPU kernels take
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
            "disable_log_stats": True,
        }
        self.llm = LLM(str(checkpoint), **small | settings)

    def __enter__(self):
        return self.llm

    def __exit__(self, *_):
        self.llm.llm_engine.engine_core.shutdown()


def image(number, size=(10, 12)):
    colours = torch.Generator().manual_seed(number)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=colours, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def ask(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def conversations():
    """16, of 0 to 3 images, of different lengths; some with earlier rounds."""
    texts = ["what is this?", "is it red? " * 5, "no", "a blue  circle\nand a green one, 你好"]
    made = [ask(text, *map(image, range(count))) for text in texts for count in (0, 1, 2, 3)]
    made[1] = [*made[1], {"role": "assistant", "content": "red"}, *ask("and now?", image(7))]
    made[4] = [*made[4], {"role": "assistant", "content": "a circle"}, *ask("what colour?")]
    return made


NEW = 12  # tokens of an answer


def engine_tokens(engine, messages, new=NEW):
    """The Engine's greedy tokens, each conversation asked alone."""
    from owl2.engine.sampling import SamplingParams

    prompt = engine.encode(messages)
    params = SamplingParams(max_new_tokens=new)
    return engine.core.generate([prompt], params, [new], engine.end_ids)[0]


def vllm_tokens(llm, many, new=NEW):
    """vLLM's, for conversations that it is asked together: through its chat, as a server is."""
    from vllm import SamplingParams

    asked = [[_for_vllm(message) for message in messages] for messages in many]
    outputs = llm.chat(asked, SamplingParams(temperature=0, max_tokens=new), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _for_vllm(message):
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}
