"""Loading of a model for inference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from owl2.checkpoints.quantization import quantization_config
from owl2.engine.backends import weight_only_quantization
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.runtime import select_device, select_dtype, tune_malloc


@dataclass(frozen=True)
class ModelArgs:
    """The model options of a command; see `load_model` and `Owl2Processor.from_pretrained`."""

    model: str
    device: str | None = None
    dtype: str | None = None
    image_policy: Any = None  # an ImagePolicy; Owl2ImageProcessor checks it
    max_pixels: int | None = None
    quantize: str | None = None

    def load_processor(self) -> Owl2Processor:
        """The processor of the checkpoint."""
        return Owl2Processor.from_pretrained(
            self.model, image_policy=self.image_policy, max_pixels=self.max_pixels
        )

    def load_model(self) -> Owl2ForConditionalGeneration:
        """The model of the checkpoint."""
        return load_model(self.model, self.device, self.dtype, quantize=self.quantize)


def load_model(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantize: str | None = None,
) -> Owl2ForConditionalGeneration:
    """The model of a checkpoint, in evaluation mode on its device.

    Args:
        name_or_path: A directory or a hub id.
        device: Default: see `select_device`.
        dtype: Default: see `select_dtype`.
        attn_implementation: eager, sdpa or flash_attention_2.
        quantize: 8bit or 4bit: quantize the weights of the decoder, on a CPU with
            `weight_only_quantization`, on a GPU with bitsandbytes.

    Raises:
        InputError: The checkpoint, device, dtype or attention implementation does not exist.
    """
    selected = select_device(device)
    if selected.type == "cpu":
        tune_malloc()
    names = weight_only_quantization.BITS
    if quantize is not None and quantize not in names:
        raise InputError(
            f"quantize is {quantize!r}; it must be one of {', '.join(names)}.",
            ErrorCode.UNKNOWN_NAME,
        )
    options: dict[str, Any] = {"dtype": select_dtype(selected, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantize is not None and selected.type == "cuda":
        options["quantization_config"] = quantization_config(quantize, options["dtype"])
        options["device_map"] = {"": selected}  # bitsandbytes cannot move the model afterwards
    try:
        model = Owl2ForConditionalGeneration.from_pretrained(name_or_path, **options)
    except InputError:
        raise
    # transformers raises these for an attention implementation that is unknown or not installed.
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{name_or_path} cannot be loaded: {error}", ErrorCode.UNSUPPORTED
        ) from error
    if "quantization_config" in options:
        return model.eval()
    if quantize is not None:
        weight_only_quantization.quantize(model, quantize)
    try:
        return model.to(selected).eval()
    except RuntimeError as error:  # no driver, or out of memory
        raise InputError(
            f"The model cannot be moved to device {str(selected)!r}: {error}",
            ErrorCode.UNSUPPORTED,
        ) from error
