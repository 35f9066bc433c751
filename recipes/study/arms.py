"""The models of a study: the untrained start, and the changes of an arm."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from study import SMOLLM2, ModelChanges, Start, smollm2_file
from torch import nn

from owl2 import Owl2ForConditionalGeneration
from owl2.checkpoints.from_backbones import load_llm
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_directory
from owl2.model.variants import with_separate_modules
from owl2.processing.processor import Owl2Processor
from owl2.train.init_model import init_checkpoint, load_tokenizer
from owl2.train.recipe_file import read_yaml


def make_start(start: Start, output: Path) -> None:
    """Write the untrained model of a study, as `owl2 init` does.

    Raises:
        InputError: See `init_checkpoint`; or the language model has fewer layers.
    """
    llm = str(smollm2_file()) if start.llm == SMOLLM2 else start.llm
    sizes = {} if start.config is None else read_yaml(Path(start.config))
    for section, settings in start.settings.items():
        sizes[section] = sizes.get(section, {}) | settings
    with TemporaryDirectory() as scratch:
        config = Path(scratch) / "sizes.yaml"
        config.write_text(yaml.safe_dump(sizes))
        if start.layers is not None:
            folder = Path(scratch) / "llm"
            _cut_layers(llm, start.layers, folder)
            llm = str(folder)
        init_checkpoint(
            llm,
            start.vision,
            output,
            config=config,
            image_size=start.image_size,
            use_mam=False,
            chat_template=start.chat_template,
            dtype=start.dtype,
            seed=start.seed,
        )


def _cut_layers(llm: str, count: int, output: Path) -> None:
    """Write the language model with `count` of its layers, and its tokenizer.

    The layers have equal distances. The first and the last are among them, because the last ones
    prepare the prediction.
    """
    model: Any = load_llm(llm)
    if count > len(model.model.layers):
        raise InputError(
            f"start.layers: {llm} has {len(model.model.layers)} layers, not {count}",
            ErrorCode.INVALID_VALUE,
        )
    chosen = torch.linspace(0, len(model.model.layers) - 1, count).round().int().tolist()
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in chosen)
    model.config.num_hidden_layers = count
    model.save_pretrained(output)
    load_tokenizer(llm).save_pretrained(output)


def make_arm(common: Path, changes: ModelChanges, output: Path, seed: int) -> None:
    """Write the model of an arm: the common model, or one that gives the same results.

    Args:
        seed: Of the new units of a wider MLP.

    Raises:
        InputError: An unknown module, or a smaller MLP.
    """
    model = Owl2ForConditionalGeneration.from_pretrained(common, dtype=torch.float32)
    if changes.intermediate_size is not None:
        widen_mlps(model, changes.intermediate_size, seed)
    if changes.mam_modules is not None:
        model = with_separate_modules(model, changes.mam_modules)
    processor = Owl2Processor.from_pretrained(common)
    with atomic_directory(output) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)


@torch.no_grad()
def widen_mlps(model: Owl2ForConditionalGeneration, width: int, seed: int) -> None:
    """Add units to the MLPs of the decoder, in place, without changing its results.

    The rows of new units in `gate_proj` and `up_proj` are random with the standard deviation of
    the existing rows; their columns in `down_proj` are zeros, which have gradients.

    Raises:
        InputError: `width` is smaller than the current width, or the MLPs have biases.
    """
    added = width - model.config.intermediate_size
    if added < 0:
        raise InputError(
            f"intermediate_size {width} is below that of the model, "
            f"{model.config.intermediate_size}",
            ErrorCode.INVALID_VALUE,
        )
    generator = torch.Generator().manual_seed(seed)
    layers: Any = model.model.layers
    if layers[0].mlp.gate_proj.bias is not None:
        raise InputError("an MLP with biases cannot be widened", ErrorCode.UNSUPPORTED)
    for layer in layers:
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            old = linear.weight
            new = torch.randn(added, old.shape[1], generator=generator) * old.std()
            linear.weight = nn.Parameter(torch.cat([old, new.to(old)]))
            linear.out_features = width
        old = mlp.down_proj.weight
        mlp.down_proj.weight = nn.Parameter(torch.cat([old, old.new_zeros(len(old), added)], 1))
        mlp.down_proj.in_features = width
        mlp.intermediate_size = width
    model.config.intermediate_size = width
