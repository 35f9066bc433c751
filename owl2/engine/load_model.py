"""Loading of a model and its processor for inference."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from owl2.checkpoints.adapters import base_name, find_adapter
from owl2.checkpoints.bitsandbytes import bitsandbytes_config
from owl2.checkpoints.config_file import find_file, read_config, resolve_checkpoint
from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig
from owl2.checkpoints.read_ahead import read_ahead
from owl2.checkpoints.weight_files import Provenance, fingerprint
from owl2.engine.backends.weight_only_quantization import (
    ACTIVATION_BITS,
    BITS,
    set_activation_bits,
)
from owl2.engine.lora import LoraManager, find_adapters
from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.pretrained_files import PREPROCESSOR_FILE
from owl2.processing.processor import Owl2Processor
from owl2.registry import look_up
from owl2.runtime import select_device, select_dtype, tune_malloc
from owl2.workers import WorkerRank

ENGINES = ("owl2", "vllm")  # of the commands that answer for many images


@dataclass(frozen=True)
class ModelArgs:
    """A checkpoint and how it is loaded: options of `Engine.from_pretrained` and of commands.

    Attributes:
        model: A directory or a hub id.
        device: Default: cuda, mps or cpu, the first that is available.
        dtype: Default: the best for the device (`owl2.runtime.select_dtype`).
        image_policy: resize, pad or crop, instead of the checkpoint's.
        max_pixels: The largest accepted image, instead of the checkpoint's.
        quantize: 8bit or 4bit: quantize the weights of the decoder while they are read, on a CPU
            with `weight_only_quantization`, on a GPU with bitsandbytes.
        base: For an adapter: the base model, instead of the one that the adapter names.
        attn_implementation: eager, sdpa or flash_attention_2.
        activation_bits: 16 or 8: with weights quantized by owl2 on a CPU, the integers to which
            the inputs of their Linears are converted. 8 is faster and less precise.
    """

    model: str | Path
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    image_policy: Any = None  # an ImagePolicy; Owl2ImageProcessor checks it
    max_pixels: int | None = None
    quantize: str | None = None
    base: str | Path | None = None
    attn_implementation: str | None = None
    activation_bits: int = 16

    def for_worker(self, worker: WorkerRank) -> "ModelArgs":
        """The arguments of a process: each of several processes uses its own GPU."""
        return replace(self, device=worker.device(str(select_device(self.device))))

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values of what results depend on, to resume only with the same model."""
        settings: dict[str, Any] = {"model": _identity(self.model), "quantize": self.quantize}
        if self.base is not None:
            settings["base"] = _identity(self.base)
        if self.activation_bits != ModelArgs.activation_bits:
            settings["activation_bits"] = self.activation_bits
        return settings

    def check_engine(self, engine: str) -> None:
        """Check the option `--engine` of a command.

        Raises:
            InputError: The engine is unknown, or is vLLM and does not have one of the options.
        """
        if engine not in ENGINES:
            raise InputError(
                f"--engine is {engine!r}. Choose from {', '.join(ENGINES)}.", ErrorCode.UNKNOWN_NAME
            )
        if engine == "vllm" and self != ModelArgs(self.model, dtype=self.dtype):
            raise InputError(
                "--engine vllm has no --quantize, --activation-bits, --device and --base.",
                ErrorCode.CONFLICT,
            )

    def load_processor(self) -> Owl2Processor:
        """The processor of the checkpoint."""
        return Owl2Processor.from_pretrained(
            self.model,
            base=self.base,
            image_policy=self.image_policy,
            max_pixels=self.max_pixels,
        )

    def context_length(self) -> int:
        """The tokens of the model's context, from its configuration.

        Raises:
            InputError: The checkpoint, or the base model of an adapter, cannot be read.
        """
        name, revision = resolve_checkpoint(self.model, weights=False), None
        if (adapter := find_adapter(name, {}, only_lora=False)) is not None:
            name, revision = adapter.base(self.base, {})
        return int(read_config(name, revision=revision).max_position_embeddings)

    def load_model(self) -> Owl2ForConditionalGeneration:
        """The model of the checkpoint, in evaluation mode on its device.

        Raises:
            InputError: The checkpoint, device, dtype or attention implementation does not exist.
        """
        read_ahead(self.model)
        selected = select_device(self.device)
        if selected.type == "cpu":
            tune_malloc()
        if self.quantize is not None:
            look_up("quantization", self.quantize, BITS)
        if self.activation_bits not in ACTIVATION_BITS:
            raise InputError(
                f"activation_bits is {self.activation_bits}; it must be 16 or 8.",
                ErrorCode.INVALID_VALUE,
            )
        options: dict[str, Any] = {"dtype": select_dtype(selected, self.dtype), "base": self.base}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.quantize is not None and selected.type != "cuda":
            options["quantization_config"] = Owl2QuantizationConfig(BITS[self.quantize])
        elif self.quantize is not None:
            options["quantization_config"] = bitsandbytes_config(self.quantize, options["dtype"])
            options["device_map"] = {"": selected}  # bitsandbytes cannot move the model afterwards
        try:
            model = Owl2ForConditionalGeneration.from_pretrained(self.model, **options)
        except InputError:
            raise
        # transformers raises these for an unknown or missing attention implementation.
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{self.model} cannot be loaded: {error}", ErrorCode.UNSUPPORTED
            ) from error
        set_activation_bits(model, self.activation_bits)
        if "device_map" in options:
            return model.eval()
        try:
            return model.to(selected).eval()
        except RuntimeError as error:  # no driver, or out of memory
            raise InputError(
                f"The model cannot be moved to device {str(selected)!r}: {error}",
                ErrorCode.UNSUPPORTED,
            ) from error

    def check_adapters(self, paths: Mapping[str, str | Path]) -> None:
        """Check adapters for this model, as an `Engine` does, without reading its weights.

        Raises:
            InputError: An adapter cannot be read, does not fit the model, or cannot be served
                beside it.
        """
        adapters = find_adapters(paths)
        name = resolve_checkpoint(self.model)
        if base_name(name) is not None:
            raise InputError(
                f"{name} is an adapter, beside which others cannot be served. Merge it with `owl2 "
                "merge`, and use the result as the base model.",
                ErrorCode.CONFLICT,
            )
        with torch.device("meta"):
            model = Owl2ForConditionalGeneration(read_config(name))
        model.name_or_path, model.provenance = name, Provenance.of(name, {})
        LoraManager(model, adapters)
        adapter_processors(model, self.load_processor(), paths)


def _identity(model: str | Path) -> str:
    """The fingerprint of a checkpoint, or its hub id."""
    folder = expand_user(model)
    if not folder.is_dir():
        return str(model)
    return fingerprint(folder) or str(folder.resolve())


def adapter_processors(
    model: Owl2ForConditionalGeneration,
    processor: Owl2Processor,
    paths: Mapping[str, str | Path],
) -> dict[str, Owl2Processor]:
    """The processors of adapters by name: their own, or else that of the base model.

    Raises:
        InputError: The processor of an adapter does not fit the model or has another vocabulary.
    """
    processors = {}
    for name, path in paths.items():
        processors[name] = processor
        if find_file(path, PREPROCESSOR_FILE, {}):
            max_pixels = processor.image_processor.max_pixels
            own = Owl2Processor.from_pretrained(path, base=model.name_or_path)
            own.image_processor = own.image_processor.replace(max_pixels=max_pixels)
            check_processor(model.config, own)
            if own.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
                raise InputError(
                    f"Adapter {name}: the vocabulary of {path} is not that of the base model.",
                    ErrorCode.CONFLICT,
                )
            processors[name] = own
    return processors


def check_processor(config: Owl2Config, processor: Owl2Processor) -> None:
    """Raise an InputError if a processor is not that of a model."""
    for name, in_model, in_processor in (
        ("image token id", config.image_token_id, processor.image_token_id),
        ("tokens per image", config.num_image_tokens, processor.num_image_tokens),
        ("image size", config.image_size, processor.image_processor.edge),
        # The model may have more rows. Added tokens are checked when a prompt contains them.
        ("vocabulary", config.vocab_size, max(config.vocab_size, processor.tokenizer.vocab_size)),
    ):
        if in_model != in_processor:
            raise InputError(
                f"Model and processor do not fit: {name} {in_model} in the model, "
                f"{in_processor} in the processor. Load both from the same checkpoint.",
                ErrorCode.CONFLICT,
            )
