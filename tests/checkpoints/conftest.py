"""Shared by the tests of checkpoints: a base model, an adapter, and the golden weights."""

import pytest
import torch
from safetensors.torch import load_file

from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.adapters import apply_lora
from owl2.train.recipe_sections import LoraSettings
from tests.checkpoints.layouts import GOLDEN
from tests.model.conftest import make_modalities_differ
from tests.tiny import make_model


def load(folder, **options):
    return Owl2ForConditionalGeneration.from_pretrained(folder, **options)


def make_base(folder, **settings):
    model = make_model(**settings)
    make_modalities_differ(model)
    model.save_pretrained(folder)
    return folder


def make_adapted(base, **settings):
    """Change LoRA and the saved parts as training would."""
    model = load(base)
    apply_lora(model, LoraSettings(r=4, **settings), seed=0)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=source)
    return model.eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def saved(base, tmp_path_factory):
    """A live model with every kind of adapter, and its directory."""
    model = make_adapted(base, parts=["decoder", "vision"], modules_to_save=["abstractor"])
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def released():
    return load_file(GOLDEN / "model.safetensors")
