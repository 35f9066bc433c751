"""Golden models, and the tiny model with inputs."""

import pytest
import torch

from tests.model.golden import MODELS, load_cases, load_model
from tests.tiny import make_model


@pytest.fixture(scope="session", params=MODELS)
def golden_name(request):
    return request.param


@pytest.fixture(scope="session", params=["eager", "sdpa"])
def golden_model(request, golden_name):
    """Shared by all tests, which must not modify it."""
    return load_model(golden_name, attn_implementation=request.param)


@pytest.fixture(scope="session")
def cases(golden_name):
    return load_cases(golden_name)


@pytest.fixture
def tiny():
    """A model whose visual weights differ from its text weights."""
    model = make_model().eval()
    make_modalities_differ(model)
    return model


def make_modalities_differ(model):
    """Set random weights: in a new model visual weights equal text weights and norms are 1."""
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight") or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=source)
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))


@pytest.fixture
def image_inputs():
    """A prompt with two images for the tiny model (40 tokens, 3 tokens per image, 8 px)."""
    image = [40] * 3
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": torch.tensor([[1, 5, *image, 6, 7, *image, 9, 11]]),
        "pixel_values": pixels,
    }
