"""What is measured: a model, and all that is compared with it, over the same weights."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

from owl2.bench.baseline import Textbook
from owl2.bench.presets import Origin
from owl2.bench.roofline import Limits
from owl2.bench.training import Training
from owl2.bench.workload import Request, Workload
from owl2.engine.backends.weight_only_quantization import quantize
from owl2.engine.engine_core import EngineCore
from owl2.engine.model_runner import ModelRunner
from owl2.engine.prefill import Prefiller
from owl2.engine.prefix_cache import PromptState
from owl2.engine.sampling import SamplingParams
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.variants import as_llama, as_no_mam, clone_sharing_weights
from owl2.processing.prepared_prompt import PreparedPrompt

GREEDY = SamplingParams()


class Subjects:
    """All that a figure may need; what is not asked for is not made.

    Attributes:
        origin: of the model; processes of their own make it there, too.
    """

    def __init__(self, origin: Origin, limits: Limits) -> None:
        self.origin = origin
        self.limits = limits
        self.model = origin.load()
        self.config: Any = self.model.config
        self.workload = Workload(self.config, self.model.device, self.model.dtype)
        self.textbook = Textbook(self.model)

    @cached_property
    def plain(self) -> Owl2ForConditionalGeneration:
        """The project's own code for a model without MAM."""
        return as_no_mam(self.model)

    @cached_property
    def eight_bits(self) -> Owl2ForConditionalGeneration:
        """The model with its decoder's weights in 8 bits."""
        rounded = clone_sharing_weights(self.model)
        quantize(rounded, "8bit")
        return rounded

    @cached_property
    def llama(self) -> LlamaForCausalLM:
        """transformers' LLaMA of the decoder's shape and weights."""
        return as_llama(self.model)

    @cached_property
    def training(self) -> Training:
        """Both training steps; what learns is a model of its own."""
        return Training(self.origin)

    # The project, as its users get it

    @cached_property
    def runner(self) -> EngineCore:
        """Answers many at a time, and remembers images and prefixes."""
        return EngineCore(self.model)

    @cached_property
    def forgetful(self) -> EngineCore:
        """Without memory: each request is computed from its first token on."""
        return EngineCore(self.model, enable_prefix_caching=False)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> Any:
        return self.model.get_image_features(pixel_values).pooler_output

    @cached_property
    def prompts(self) -> "Prompts":
        """The project's way with prompts, of which nothing is kept."""
        return Prompts(self.model)

    def prefill(self, ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The likeliest next tokens of prompts (B, S) with an image each."""
        rows = zip(ids.tolist(), pixel_values.split(1), strict=True)
        return self.prompts.read([self.runner.prepare(row, image) for row, image in rows])

    def answer(self, runner: EngineCore, requests: Sequence[Request]) -> list[list[int]]:
        """Greedy answers of exactly as many tokens as are wanted."""
        prompts = [as_prompt(runner, request) for request in requests]
        return runner.generate(prompts, GREEDY, [request.limit for request in requests], ())

    def first_token(self, runner: EngineCore, request: Request) -> int:
        """Ends as soon as it is there."""
        stream = runner.stream(as_prompt(runner, request), GREEDY, request.limit, ())
        try:
            return next(iter(stream))
        finally:
            if hasattr(stream, "close"):
                stream.close()


class Prompts:
    """Prompts through the project's fast path, always into the same rows of its cache.

    Args:
        feature_bytes: for images' embeddings, so that each is encoded once.
    """

    def __init__(self, model: Owl2ForConditionalGeneration, feature_bytes: int = 0) -> None:
        self.decoder = ModelRunner(model)
        self._prefiller = Prefiller(model, prefix_bytes=0, feature_bytes=feature_bytes)

    @torch.no_grad()
    def read(self, prompts: Sequence[PreparedPrompt]) -> torch.Tensor:
        """The likeliest next tokens (B,), images and all."""
        states = [PromptState(prompt) for prompt in prompts]
        return self._prefiller.prefill(states, self.decoder, 0).argmax(-1)


class Steps:
    """Decoding by the project's fast path: the same tokens again and again.

    Args:
        rows: sequences, each after the same prompt.
    """

    def __init__(
        self,
        model: Owl2ForConditionalGeneration,
        prompt: tuple[torch.Tensor, torch.Tensor | None],
        rows: int = 1,
    ) -> None:
        ids, pixel_values = prompt
        self.decoder = ModelRunner(model)
        with torch.no_grad():
            out = model(ids, pixel_values, use_cache=True, logits_to_keep=1)
        self.start = ids.shape[1]
        self.tokens = out.logits[0, -1:].argmax(-1).expand(rows)
        cache: Any = out.past_key_values
        self.decoder.cache.reserve(rows, self.start)
        for row in range(rows):
            keys, values = ([getattr(x, n)[0] for x in cache.layers] for n in ("keys", "values"))
            self.decoder.cache.write(row, keys, values)

    def decode(self, count: int) -> list[int]:
        """The `count` likeliest tokens of the first sequence; the others go along."""
        tokens, found = self.tokens, []
        for position in range(self.start, self.start + count):
            logits = self.decoder.decode(tokens, torch.full((len(tokens),), position))
            tokens = logits.argmax(-1)
            found.append(int(tokens[0]))
        return found


class LlamaSteps:
    """Decoding by transformers' LLaMA with its own cache, as its `generate` calls it."""

    def __init__(self, llama: LlamaForCausalLM, ids: torch.Tensor, rows: int = 1) -> None:
        self.llama = llama
        self.cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            out = llama(
                ids.expand(rows, -1), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.tokens = out.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def decode(self, count: int) -> list[int]:
        """The `count` likeliest tokens of the first sequence; the others go along."""
        tokens, found = self.tokens, []
        for _ in range(count):
            out = self.llama(tokens, past_key_values=self.cache, use_cache=True)
            tokens = out.logits[:, -1:].argmax(-1)
            found.append(int(tokens[0]))
        self.cache.crop(-count)  # as it was before
        return found


def as_prompt(runner: EngineCore, request: Request) -> PreparedPrompt:
    """As the project's runner takes it."""
    return runner.prepare(request.ids[0].tolist(), request.pixel_values)
