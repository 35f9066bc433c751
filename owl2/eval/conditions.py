"""The conditions of an evaluation, which are part of its results: prompts, images, generation."""

from typing import Any

import torch

from owl2.data.sample import Message
from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval.fingerprints import versions

CHAT_PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
SEED = 0  # of torch; greedy decoding draws no random numbers


def evaluation_conditions(
    engine: Engine, uses_lm_eval: bool, generation_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The values for `TaskRun.conditions` with the current settings of the engine."""
    processor, model = engine.processor, engine.model
    images = processor.image_processor
    return {
        "preprocessing": {
            "size": images.edge,
            "policy": images.image_policy,
            "mean": list(images.image_mean),
            "std": list(images.image_std),
            "tokens_per_image": processor.num_image_tokens,
        },
        "generation": {
            "engine": "lm-eval" if uses_lm_eval else "owl2",
            **({} if uses_lm_eval else generation_kwargs),
            "dtype": str(model.dtype).removeprefix("torch."),
            "chat_format": render_prompt(engine, CHAT_PROBE),
            "attn_implementation": model.config._attn_implementation,
            "mam": bool(model.config.use_mam),
        },
        "seeds": {"torch": SEED},
        "versions": versions(),
    }


def environment(engine: Engine, num_processes: int, batch_size: int) -> dict[str, Any]:
    """The machine and the batches, which change responses only by rounding errors."""
    device = engine.model.device
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "processes": num_processes,
        "batch_size": batch_size,
    }


def render_prompt(engine: Engine, messages: list[Message]) -> str:
    """The text of a prompt, with ``<|image|>`` for each image; "" if the messages are invalid."""
    try:
        prompt = engine.processor.apply_chat_template(messages, add_generation_prompt=True)
    except InputError:
        return ""
    return str(prompt)
