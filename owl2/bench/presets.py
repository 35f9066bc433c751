"""Models to measure: checkpoints, or presets with random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights

from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.registry import look_up
from owl2.runtime import select_device, select_dtype

DEFAULT_SIZE = "bench"
Sizes = tuple[int, int, int, int]
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _config(
    decoder: Sizes,
    vision: Sizes,
    abstractor: Sizes,
    image_size: int = 224,
    queries: int = 64,
    vocab_size: int = 32000,
) -> dict[str, Any]:
    """Arguments of `Owl2Config`. The sizes of each part are in the order of `SIZES`."""
    decoder_sizes, vision_sizes, abstractor_sizes = (
        dict(zip(SIZES, sizes, strict=True)) for sizes in (decoder, vision, abstractor)
    )
    abstractor_sizes |= {"encoder_hidden_size": vision[0], "num_learnable_queries": queries}
    visual = {
        "visual_model": vision_sizes | {"image_size": image_size},
        "visual_abstractor": abstractor_sizes,
    }
    return {"vocab_size": vocab_size, **decoder_sizes, "visual_config": visual}


# The sizes of the decoder, the vision encoder and the abstractor.
PRESETS: dict[str, dict[str, Any]] = {
    # A smoke test: the complete benchmark runs in seconds, and its results are meaningless.
    "tiny": _config((64, 96, 2, 4), (32, 64, 2, 2), (32, 48, 2, 2), 28, queries=4, vocab_size=320),
    # 284 M parameters: small enough for two cores, large enough to be limited by arithmetic.
    "bench": _config((1024, 2816, 12, 16), (512, 2048, 8, 8), (512, 1408, 4, 8)),
    # Named by their number of parameters, for scaling curves.
    "135m": _config((640, 1856, 12, 10), (384, 1536, 8, 6), (384, 1024, 4, 6)),
    "1b": _config((2048, 5632, 14, 16), (768, 3072, 12, 12), (768, 2048, 6, 12)),
    "3b": _config((2560, 6912, 28, 20), (1024, 4096, 24, 16), (1024, 2816, 6, 16)),
    "7b": {"vocab_size": 32000},  # 8.2 B, the released size: the defaults of the configuration
}


@dataclass(frozen=True)
class BenchModel:
    """The model to measure, in a form that another process can load again.

    Attributes:
        model: A directory or a hub id; None: random weights.
        size: A name in `PRESETS`, for random weights. Default: `DEFAULT_SIZE`.
        device, dtype: Names for `select_device` and `select_dtype`; None: their defaults.

    Raises:
        InputError: Both a model and a size.
    """

    model: str | None = None
    size: str | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.size is not None:
            raise InputError("Give either --model or --size.", ErrorCode.CONFLICT)

    @property
    def title(self) -> str:
        """The title of the report."""
        return self.model or f"size {self.size or DEFAULT_SIZE}, random weights"

    def num_parameters(self) -> int:
        """Parameters of the preset. Raises `InputError` for an unknown size."""
        with init_empty_weights():
            return sum(weight.numel() for weight in self._preset().parameters())

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype. Raises `InputError` for unknown names."""
        device = select_device(self.device)
        return device, select_dtype(device, self.dtype)

    def load(self) -> Owl2ForConditionalGeneration:
        """Load the checkpoint, or create the preset; torch's random state does not change.

        Raises:
            InputError: Unknown checkpoint, size, device or dtype.
        """
        device, dtype = self.device_and_dtype()
        if self.model is not None:
            return ModelArgs(self.model, device, dtype).load_model()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(0)
            return self._preset(dtype=dtype).eval()

    def _preset(self, **options: Any) -> Owl2ForConditionalGeneration:
        """The preset's model on torch's current device."""
        config = Owl2Config(**look_up("size", self.size or DEFAULT_SIZE, PRESETS))
        # The Auto classes' `from_config` calls this. It creates no float32 copy.
        model: Owl2ForConditionalGeneration = Owl2ForConditionalGeneration._from_config(
            config, **options
        )
        return model
