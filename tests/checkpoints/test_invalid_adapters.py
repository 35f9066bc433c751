"""Adapters with missing, unexpected, or corrupt content are rejected."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from owl2.errors import ErrorCode
from tests.checkpoints.conftest import load
from tests.errors import raises_input_error


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the directory, to be corrupted."""
    return Path(shutil.copytree(saved[1], tmp_path / "adapter"))


def corrupt(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


LORA = "base_model.model.model.layers.0.self_attn.v_proj.multiway.1.lora_A.weight"
SAVED_PART = "base_model.model.model.visual_abstractor.vit_eos"


@pytest.mark.parametrize("key", [LORA, SAVED_PART])
def test_missing_key_is_rejected(copied, key):
    corrupt(copied, lambda tensors: tensors.pop(key))
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, key):
        load(copied)


def test_unexpected_key_is_rejected(copied):
    corrupt(copied, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}))
    with raises_input_error(ErrorCode.UNEXPECTED_WEIGHTS, "base_model.model.lm_head.weight"):
        load(copied)


def test_other_shape_is_rejected(copied):
    corrupt(copied, lambda tensors: tensors.update({LORA: torch.zeros(4, 17)}))
    with raises_input_error(ErrorCode.SHAPE_MISMATCH, "(4, 17)", "(4, 16)"):
        load(copied)


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("adapter_config.json", "{", ErrorCode.INVALID_CONFIG),
        ("adapter_config.json", '{"peft_type": "IA3"}', ErrorCode.UNSUPPORTED),
        ("adapter_config.json", '{"peft_type": "LORA"}', ErrorCode.INVALID_CONFIG),
        ("adapter_model.safetensors", "text", ErrorCode.UNREADABLE_FILE),
        ("adapter_model.safetensors", None, ErrorCode.MISSING_WEIGHTS),
        ("base.json", "[]", ErrorCode.INVALID_CONFIG),
    ],
)
def test_corrupt_files_are_named(copied, file, text, code):
    (copied / file).unlink()
    if text is not None:
        (copied / file).write_text(text, encoding="utf-8")
    with raises_input_error(code, file):
        load(copied)


def test_adapter_as_base_is_rejected(saved, tmp_path):
    with raises_input_error(ErrorCode.INVALID_CONFIG, saved[1]):
        load(saved[1], base=saved[1])
