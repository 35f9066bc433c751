"""Where the modality-adaptive module acts: attention, distances of weights, replaced weights.

The paper's figures 4 and 5 show the attention of one example. Here it is averaged over questions of
the test split, with their expected answers, so that all models are compared on the same tokens.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from owl2 import Engine
from owl2.attention import collect_attention
from owl2.files import atomic_directory
from owl2.model.modality import module_pair
from owl2.model.variants import with_separate_modules
from owl2.processing.processor import Owl2Processor

QUESTIONS = "test_exact.jsonl"
PROJECTIONS = ("k_proj", "v_proj")
LayerValues = dict[str, list[float]]


def where_it_acts(engine: Engine, data: Path, count: int) -> dict[str, LayerValues]:
    """The attention of a model by layer, and the distance of its visual from its text weights.

    Args:
        data: The directory of the study's data.
        count: Questions whose attention is averaged, at equal distances in the file.

    Returns:
        ``attention``: see `attention_shares`; for a model with MAM also
        ``attention_text_weights``, with the text weights for images, and ``distance``.
    """
    lines = (data / QUESTIONS).read_text("utf-8").splitlines()
    questions = [json.loads(line) for line in lines[:: max(1, len(lines) // count)][:count]]
    found = {"attention": attention_shares(engine, questions, data)}
    if engine.model.config.use_mam:
        text = attention_shares(engine, questions, data, use_mam=False)
        found |= {"attention_text_weights": text, "distance": weight_distances(engine.model)}
    return found


def attention_shares(
    engine: Engine, questions: list[dict[str, Any]], data: Path, use_mam: bool = True
) -> LayerValues:
    """The part of the attention of an answer's tokens on ``image``, ``text`` and ``answer``.

    The mean over the questions of the mean over the tokens and the heads, for each layer.
    """
    total: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(()))
    for question in questions:
        image = Image.open(data / question["image"])
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question["question"]}]
        maps = collect_attention(
            engine,
            engine.processor,
            [{"role": "user", "content": parts}],
            answer=question["answers"][0],
            layers=[],
            use_mam=use_mam,
        )
        shares = maps.shares.mean(1)  # (L, spans)
        for kind in ("image", "text", "answer"):
            columns = [i for i, span in enumerate(maps.spans) if span.kind == kind]
            total[kind] = total[kind] + shares[:, columns].sum(1) / len(questions)
    return {kind: np.atleast_1d(values).tolist() for kind, values in total.items()}


@torch.no_grad()
def weight_distances(model: Any) -> LayerValues:
    """For each separate module and layer, ``|visual - text| / |text|`` (Frobenius norms)."""
    distances: LayerValues = {name: [] for name in model.config.separate_modules}
    for layer in model.model.layers:
        for name, values in distances.items():
            owner = layer.self_attn if name in PROJECTIONS else layer
            text, visual = (module.weight.float() for module in module_pair(owner, name))
            values.append(((visual - text).norm() / text.norm()).item())
    return distances


def replace_keys_and_values(model: Path, output: Path) -> bool:
    """Write the model with the text weights for the keys and values of images.

    Returns:
        False if the model has no others, so that nothing is written.
    """
    engine = Engine.from_pretrained(model, device="cpu", dtype="float32")
    separate = engine.model.config.separate_modules
    kept = [name for name in separate if name not in PROJECTIONS]
    if len(kept) == len(separate):
        return False
    with atomic_directory(output) as directory:
        with_separate_modules(engine.model, kept).save_pretrained(directory)
        Owl2Processor.from_pretrained(model).save_pretrained(directory)
    return True
