"""Quantized checkpoints through the loader of transformers.

Format: docs/reference/quantized-checkpoints.md.

`from_pretrained` finds ``quantization_config`` in config.json and replaces the Linears by
`QuantizedLinear` before it loads their ``weight`` and ``scale``. With the argument
``quantization_config=Owl2QuantizationConfig(bits=4)`` a checkpoint without quantization is
quantized while it is read (`quantized_weights`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from owl2.checkpoints.weight_names import EMBEDDINGS, HEAD, HEAD_WEIGHT, module_name, released_name
from owl2.engine.backends.weight_only_quantization import (
    BITS,
    BLOCK_ROWS,
    GROUP,
    QuantizedLinear,
)
from owl2.errors import ErrorCode, InputError

QUANT_METHOD = "owl2"
UNQUANTIZED = 16  # bits


@register_quantization_config(QUANT_METHOD)
class Owl2QuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint: the bits of its Linears.

    Args:
        bits: 4 or 8, of the Linears in the decoder's layers.
        group_size: 4-bit weights that share a scale; 64 is the only size.
        modules: A dictionary: bits of single modules by their released names, instead of `bits`;
            16: not quantized. Default: the head has 8 bits. Embeddings with 8 bits are those of the
            head.
        method: How the values were rounded; "rtn" is to the nearest.
        base_fingerprint: Fingerprint of the checkpoint before quantization, which adapters refer
            to.
        block_rows: Rows that are stored together, see `QuantizedLinear`; 16 is the only number.

    Raises:
        InputError: An unknown option or value.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = GROUP,
        modules: Any = None,  # of config.json, which may contain anything
        method: str = "rtn",
        base_fingerprint: str | None = None,
        block_rows: int = BLOCK_ROWS,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method: Any = quant_method
        self.bits = bits
        self.group_size = group_size
        given: Any = modules  # config.json can have a value of any type
        self.modules: dict[str, int] = dict(given) if isinstance(given, dict) else {HEAD: 8}
        self.method = method
        self.base_fingerprint = base_fingerprint
        self.block_rows = block_rows
        choices = sorted(BITS.values())
        problem = ""
        if not isinstance(given, dict | None):
            problem = f"modules must be a mapping of names to bits, not {given!r}"
        elif unknown:
            problem = f"unknown options: {', '.join(sorted(unknown))}"
        elif bits not in choices or any(b not in (*choices, 16) for b in self.modules.values()):
            problem = f"bits must be 4 or 8, or 16 in `modules`: {bits}, {self.modules}"
        elif group_size != GROUP:
            problem = f"group_size must be {GROUP}, not {group_size}"
        elif self.bits_of(EMBEDDINGS) < UNQUANTIZED and not (
            self.bits_of(EMBEDDINGS) == self.bits_of(HEAD) == 8
        ):
            problem = f"{EMBEDDINGS} must have 16 bits, or share the 8 bits of {HEAD}: {modules}"
        if problem:
            raise InputError(f"quantization_config: {problem}", ErrorCode.INVALID_CONFIG)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The configuration in config.json. Without `block_rows` it is of an earlier version, which
        stored rows one after the other."""
        return super().from_dict({"block_rows": 1} | config_dict, *args, **kwargs)

    def bits_of(self, name: str) -> int:
        """The bits of a Linear with this name, released or in the model; `UNQUANTIZED` or less."""
        name = released_name(name)
        if not name.startswith(("model.", HEAD)):  # of an `Owl2Model`
            name = f"model.{name}"
        default = self.bits if name == HEAD or name.startswith("model.layers.") else UNQUANTIZED
        return self.modules.get(name, default)


@register_quantizer(QUANT_METHOD)
class Owl2Quantizer(HfQuantizer):
    """Creates the quantized Linears of a model that is being loaded."""

    quantization_config: Owl2QuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized and config.block_rows != BLOCK_ROWS:
            raise InputError(
                f"quantization_config: block_rows is {config.block_rows}, not {BLOCK_ROWS}. An "
                "earlier version wrote this checkpoint; run `owl2 quantize` again.",
                ErrorCode.INVALID_CONFIG,
            )
        config.block_rows = BLOCK_ROWS  # a dictionary of options does not have it
        quantize_model(model, self.quantization_config)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether `save_pretrained` can write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model."""
        return True


@torch.no_grad()
def quantize_model(
    model: Any,
    config: "Owl2QuantizationConfig | str",
    make: type[QuantizedLinear] = QuantizedLinear,
) -> None:
    """Quantize a model's Linears in place. Their weights can be on the meta device.

    Args:
        model: An `Owl2ForConditionalGeneration`, or its model without head. Its Linears cannot be
            trained afterwards.
        config: Or one of `BITS`.
        make: The class of the quantized Linears.
    """
    if isinstance(config, str):
        config = Owl2QuantizationConfig(BITS[config])
    for name, module in list(model.named_modules()):
        bits = config.bits_of(name.removesuffix(".base_layer"))
        if type(module) is nn.Linear and bits < UNQUANTIZED and ".lora_" not in name:
            model.set_submodule(name, make(module, bits))
    if config.bits_of(HEAD) < UNQUANTIZED:  # the embeddings are not quantized
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys.pop(HEAD_WEIGHT, None)
    model.config.quantization_config = config
    model.hf_quantizer = Owl2Quantizer(config, pre_quantized=True)
    model.is_quantized = True


class StoredDtypeLinear(nn.Linear):
    """A Linear whose weight keeps the 16 bits of its file where the computation is in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N), in the dtype of `x`, or in that of autocast."""
        is_cast = torch.is_autocast_enabled(x.device.type)
        weight = self.weight if is_cast else self.weight.to(x.dtype)
        return functional.linear(x, weight, self.bias)

    def restore(self) -> None:
        """Become a Linear in float32, in place."""
        self.weight.data = self.weight.data.float()
        self.__class__ = nn.Linear  # type: ignore[assignment]  # it has the same attributes


def keep_stored_dtype(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make Linears of the vision encoder and the abstractor `StoredDtypeLinear`, in place.

    Their weights then stay in the mapped file also on CPUs without bfloat16. The conversion takes
    a fraction of the time of an image.

    Args:
        model: In float32, before its weights are loaded.
        tensors: The stored tensors by name.
    """
    tensors = {module_name(name): tensor for name, tensor in tensors.items()}
    for name, module in model.named_modules():
        stored = tensors.get(f"{name}.weight")
        if type(module) is nn.Linear and stored is not None:
            is_shorter = stored.is_floating_point() and stored.itemsize < module.weight.itemsize
            if is_shorter and is_visual_linear(f"{name}.weight", stored):
                module.weight = nn.Parameter(module.weight.to(stored.dtype))
                module.__class__ = StoredDtypeLinear


def is_visual_linear(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight belongs to a Linear of the vision encoder or the abstractor."""
    name = released_name(name)
    is_visual = "vision_model." in name or "visual_abstractor." in name
    return is_visual and name.endswith(".weight") and weight.dim() == 2


def stored_quantization(config: Any) -> Owl2QuantizationConfig | None:
    """The quantization by owl2 in a model's configuration; None if there is no such quantization.

    Raises:
        InputError: An invalid option.
    """
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD:
        return Owl2QuantizationConfig.from_dict(stored)
    return stored if isinstance(stored, Owl2QuantizationConfig) else None


def check_quantization(name: str | Path, config: Any, options: dict[str, Any]) -> None:
    """Reject another quantization of a quantized checkpoint; the same one needs no argument.

    Args:
        options: Of `from_pretrained`; ``quantization_config`` is removed if it is the same one.

    Raises:
        InputError: The checkpoint has other bits, or another quantization is requested.
    """
    stored, given = stored_quantization(config), options.get("quantization_config")
    if stored is None or given is None:
        return
    if not isinstance(given, Owl2QuantizationConfig) or given.bits != stored.bits:
        raise InputError(
            f"{name} is already quantized to {stored.bits} bits; load it without `quantize`",
            ErrorCode.CONFLICT,
        )
    del options["quantization_config"]
