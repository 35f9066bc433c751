"""Models to measure: sizes with names and random weights."""

from dataclasses import dataclass
from typing import Any

import torch

from owl2.engine.load_model import load_model
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.registry import look_up
from owl2.runtime import select_device, select_dtype

SIZES: dict[str, dict[str, Any]] = {
    # A toy with which all of the bench runs in seconds; its figures mean nothing.
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
    # 284 M parameters: small enough for two cores, large enough that arithmetic takes the time.
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
    "7b": {"vocab_size": 32000},  # the released model's: all defaults of the configuration
}


@dataclass(frozen=True)
class Origin:
    """Where the measured model comes from, so that another process can make the same.

    Attributes:
        model: a directory or hub id; None: random weights.
        size: a name in `SIZES`, of random weights.
        device, dtype: names, as `owl2.engine.load_model` takes them; None: what suits.
    """

    model: str | None = None
    size: str = "bench"
    device: str | None = None
    dtype: str | None = None

    @property
    def title(self) -> str:
        """For people."""
        return self.model or f"the size {self.size}, random weights"

    def place(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype.

        Raises:
            InputError: for names of none.
        """
        device = select_device(self.device)
        return device, select_dtype(device, self.dtype)

    def load(self) -> Owl2ForConditionalGeneration:
        """The model, ready to answer.

        Raises:
            InputError: no such checkpoint, size, device or dtype.
        """
        device, dtype = self.place()
        if self.model is not None:
            return load_model(self.model, device, dtype)
        return random_model(self.size, device, dtype)


def random_model(
    size: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Owl2ForConditionalGeneration:
    """A model of one of `SIZES` with random weights; torch's generators are as they were.

    Raises:
        InputError: for a size without such a name.
    """
    config = Owl2Config(**look_up("size", size, SIZES))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        # What the Auto classes' `from_config` calls; building in `dtype` spares float32 copies.
        model: Owl2ForConditionalGeneration = Owl2ForConditionalGeneration._from_config(
            config, dtype=dtype
        )
    return model.eval()
