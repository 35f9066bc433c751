"""Shared by the tests of the engine: an engine, images, and conversations of many kinds."""

import copy
import threading
from queue import SimpleQueue

import pytest
import torch
from PIL import Image

from owl2.engine.engine import Engine
from owl2.engine.engine_core import EngineCore
from owl2.engine.prompt_state import PromptState
from owl2.engine.sampling_params import SamplingParams
from owl2.engine.scheduler import Request
from tests.family import FOLDER, SIBLINGS

# Of JSON answers: strings with quotes and non-ASCII characters, integers, arrays.
SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", 'dark "blue"', "蓝🦉"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"const": "x"}, "maxItems": 2},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def shared_engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="session", params=["mplug_owl2", *SIBLINGS])
def any_engine(request, shared_engine):
    """Engines of all model types: the tiny one, and the golden checkpoints."""
    if request.param not in SIBLINGS:
        return shared_engine
    return Engine.from_pretrained(FOLDER / request.param / "model", "cpu", "float32")


@pytest.fixture
def engine(shared_engine):
    """An engine without caches that a test may modify."""
    return Engine(copy.deepcopy(shared_engine.model), shared_engine.processor)


@pytest.fixture
def nan_engine(engine):
    """An engine whose model produces NaN."""
    with torch.no_grad():
        engine.model.lm_head.weight[5, 0] = float("nan")
    return engine


def caching_engine(shared_engine, **options):
    """An engine with its own model that also caches short prefixes."""
    engine = Engine(copy.deepcopy(shared_engine.model), shared_engine.processor)
    engine.core = EngineCore(
        engine.model, **{"max_num_seqs": 128, "min_prefix_tokens": 2} | options
    )
    return engine


@pytest.fixture
def step_hooks(monkeypatch):
    """Functions that get the number of running requests before every decode step of any engine."""
    hooks = []

    def on_step(core, num_running):
        for hook in hooks:
            hook(num_running)

    monkeypatch.setattr(EngineCore, "on_step", on_step)
    return hooks


@pytest.fixture
def batch_sizes(step_hooks):
    """The number of running requests in every decode step, in a growing list."""
    sizes = []
    step_hooks.append(sizes.append)
    return sizes


class Gate:
    """Decode steps after the first `free_steps` wait until it is open."""

    def __init__(self):
        self.free_steps = 0
        self.reached = threading.Event()
        self._open = threading.Event()

    def wait(self, num_running):
        self.free_steps -= 1
        if self.free_steps < 0:
            self.reached.set()
            assert self._open.wait(60)

    def open(self):
        self._open.set()


@pytest.fixture
def gate(step_hooks):
    """Holds back every decode step until the test opens it."""
    result = Gate()
    step_hooks.append(result.wait)
    yield result
    result.open()


def stream_tokens(core, prompt, max_tokens, end_ids=()):
    """The token ids of a greedy answer as they are generated; closing the iterator aborts it."""
    events = SimpleQueue()
    device = core.model.device
    request = Request(PromptState(prompt), SamplingParams(), max_tokens, end_ids, device)
    request.on_token = lambda token, logprobs: events.put(token)
    request.on_end = events.put
    core.submit([request])
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        request.aborted = True


def random_image(seed, size=(10, 12)):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def ask(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def model_inputs(engine, messages, **options):
    """What `generate` of the engine's model is called with."""
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return engine.processor.apply_chat_template(messages, add_generation_prompt=True, **options)


@pytest.fixture(scope="session")
def conversations():
    """12 conversations with 0, 1 and 2 images and different lengths; some have earlier turns."""
    texts = ["what is this?", "is it red? " * 4, "no", "a blue circle and a green one, 你好"]
    result = [ask(text, *map(random_image, range(n))) for text in texts for n in (0, 1, 2)]
    result[1] = [
        *result[1],
        {"role": "assistant", "content": "red"},
        *ask("and now?", random_image(7)),
    ]
    result[6] = [*result[6], {"role": "assistant", "content": "a circle"}, *ask("what color?")]
    return result


@pytest.fixture
def three_threads(monkeypatch):
    """Run kernels with three threads, even for little work."""
    monkeypatch.setattr("owl2.engine.backends.native.ops.MIN_PARALLEL_WORK", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
