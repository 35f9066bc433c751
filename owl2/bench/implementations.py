"""The implementations that are compared. All share the weights of one model."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

from owl2.bench.baseline import as_baseline
from owl2.bench.flops import image_flops
from owl2.bench.measure import Roofline
from owl2.bench.presets import BenchModel
from owl2.bench.training import TrainingSteps
from owl2.bench.workload import BenchRequest, Workload
from owl2.checkpoints.hf_quantizer import quantize_model
from owl2.engine.engine_core import EngineCore
from owl2.engine.model_runner import ModelRunner
from owl2.engine.prompt_state import PromptState
from owl2.engine.running_batch import RunningBatch
from owl2.engine.sampling_params import SamplingParams
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.variants import as_llama, as_no_mam, clone_sharing_weights
from owl2.processing.prepared_prompt import PreparedPrompt


class Implementations:
    """A model and the implementations over its weights; most are created on first use.

    Attributes:
        source: Loads the same model in another process.
        roofline: The limits of the machine.
    """

    def __init__(self, source: BenchModel, roofline: Roofline) -> None:
        self.source = source
        self.roofline = roofline
        self.model = source.load()
        self.baseline = as_baseline(self.model)
        self.workload = Workload(self.model.config, self.model.device, self.model.dtype)

    @cached_property
    def no_mam(self) -> Owl2ForConditionalGeneration:
        """The same code for a model without MAM."""
        return as_no_mam(self.model)

    @cached_property
    def int8(self) -> Owl2ForConditionalGeneration:
        """The model with 8-bit weights in the decoder."""
        quantized = clone_sharing_weights(self.model)
        quantize_model(quantized, "8bit")
        return quantized

    @cached_property
    def llama(self) -> LlamaForCausalLM:
        """transformers' LLaMA with the text weights of the decoder."""
        return as_llama(self.model)

    @cached_property
    def training(self) -> TrainingSteps:
        """Training steps, on a second copy of the model."""
        return TrainingSteps(self.source)

    @cached_property
    def engine(self) -> EngineCore:
        """The engine with its caches of images and prefixes."""
        return EngineCore(self.model)

    @cached_property
    def engine_without_caches(self) -> EngineCore:
        """An engine that computes each request from its first token."""
        return EngineCore(self.model, enable_prefix_caching=False)

    @cached_property
    def image_flops(self) -> int:
        """FLOPs of one image."""
        return image_flops(self.baseline)


def generate(engine: EngineCore, requests: Sequence[BenchRequest]) -> list[list[int]]:
    """Greedy answers of exactly `limit` tokens each."""
    prompts = [
        engine.prepare(request.ids[0].tolist(), request.pixel_values) for request in requests
    ]
    return engine.generate(prompts, SamplingParams(), [request.limit for request in requests], ())


class PrefillRunner:
    """Prefill on owl2's fast path. It reuses the same rows of its KV cache.

    Args:
        feature_bytes: Size of the image feature cache; 0 encodes images every time.
    """

    def __init__(self, model: Owl2ForConditionalGeneration, feature_bytes: int = 0) -> None:
        self._batch = RunningBatch(model, prefix_bytes=0, image_bytes=feature_bytes)

    @torch.no_grad()
    def run(self, prompts: Sequence[PreparedPrompt]) -> torch.Tensor:
        """The most likely next tokens (B,)."""
        states = [PromptState(prompt) for prompt in prompts]
        return self._batch.prefill(states, first_row=0).max(-1).indices


class TransformersDecodeRunner:
    """Decoding with transformers' cache, as `generate` does, always from the same position.

    Args:
        rows: Number of sequences; all have the same prompt.
    """

    def __init__(self, model: Any, request: BenchRequest, rows: int = 1) -> None:
        self.rows = rows
        self.model = model
        self.cache = DynamicCache(config=model.config)
        images = {} if request.pixel_values is None else {"pixel_values": request.pixel_values}
        with torch.no_grad():
            out = model(request.ids.expand(rows, -1), past_key_values=self.cache, **images)
        self.first_tokens = out.logits[:, -1].argmax(-1)  # (rows,)
        self.length = request.ids.shape[1]

    @torch.no_grad()
    def decode(self, count: int) -> list[int]:
        """Decode `count` tokens in every row; returns those of the first row."""
        tokens, generated = self.first_tokens, []
        for position in range(self.length, self.length + count):
            tokens = self.logits(tokens, position).max(-1).indices  # faster than argmax
            generated.append(int(tokens[0]))
        if added := self.cache.get_seq_length() - self.length:
            self.cache.crop(-added)
        return generated

    def logits(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, V) after the tokens (rows,) at a position."""
        out = self.model(tokens[:, None], past_key_values=self.cache)
        return out.logits[:, -1]


class DecodeRunner(TransformersDecodeRunner):
    """Decoding on owl2's fast path."""

    def __init__(
        self, model: Owl2ForConditionalGeneration, request: BenchRequest, rows: int = 1
    ) -> None:
        super().__init__(model, request)
        self.rows = rows
        self.first_tokens = self.first_tokens.expand(rows)
        self.runner = ModelRunner(model)
        self.runner.cache.reserve(rows, self.length)
        cache: Any = self.cache
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        for row in range(rows):
            self.runner.cache.write(row, layers)

    def logits(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        return self.runner.decode(tokens, torch.full((len(tokens),), position))
