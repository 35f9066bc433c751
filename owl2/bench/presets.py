"""Models to measure: checkpoints, or presets with random weights."""

from dataclasses import dataclass
from typing import Any

import torch

from owl2.engine.load_model import load_model
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.registry import look_up
from owl2.runtime import select_device, select_dtype

PRESETS: dict[str, dict[str, Any]] = {
    # A smoke test: the complete benchmark runs in seconds, and its results are meaningless.
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "visual_config": {
            "visual_model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "image_size": 28,
            },
            "visual_abstractor": {
                "hidden_size": 32,
                "encoder_hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "num_learnable_queries": 4,
            },
        },
    },
    # 284 M parameters: small enough for two cores, large enough to be limited by arithmetic.
    "bench": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "visual_config": {
            "visual_model": {
                "hidden_size": 512,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "intermediate_size": 2048,
                "image_size": 224,
            },
            "visual_abstractor": {
                "hidden_size": 512,
                "encoder_hidden_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "intermediate_size": 1408,
            },
        },
    },
    "7b": {"vocab_size": 32000},  # the released size: the defaults of the configuration
}


@dataclass(frozen=True)
class BenchModel:
    """The model to measure, in a form that another process can load again.

    Attributes:
        model: a directory or a hub id; None: random weights.
        size: a name in `PRESETS`, for random weights.
        device, dtype: names for `select_device` and `select_dtype`; None: their defaults.
    """

    model: str | None = None
    size: str = "bench"
    device: str | None = None
    dtype: str | None = None

    @property
    def title(self) -> str:
        """The title of the report."""
        return self.model or f"size {self.size}, random weights"

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype. Raises `InputError` for unknown names."""
        device = select_device(self.device)
        return device, select_dtype(device, self.dtype)

    def load(self) -> Owl2ForConditionalGeneration:
        """Load the checkpoint, or create the preset; torch's random state does not change.

        Raises:
            InputError: unknown checkpoint, size, device or dtype.
        """
        device, dtype = self.device_and_dtype()
        if self.model is not None:
            return load_model(self.model, device, dtype)
        config = Owl2Config(**look_up("size", self.size, PRESETS))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(0)
            # The Auto classes' `from_config` calls this. It creates no float32 copy.
            model: Owl2ForConditionalGeneration = Owl2ForConditionalGeneration._from_config(
                config, dtype=dtype
            )
        return model.eval()
