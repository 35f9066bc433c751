"""What the tests of the bench share: a model whose modalities differ, and inputs for it."""

import pytest
import torch

from owl2.bench.baseline import Textbook
from owl2.bench.workload import Workload
from tests.model.conftest import make_modalities_differ
from tests.tiny import make_model


@pytest.fixture(params=[True, False], ids=["mam", "no mam"])
def model(request):
    """Small enough to be exact, with grouped queries; two queries an image."""
    made = make_model(use_mam=request.param).eval()
    make_modalities_differ(made)
    return made


@pytest.fixture
def textbook(model):
    return Textbook(model)


@pytest.fixture
def workload(model):
    return Workload(model.config, torch.device("cpu"), torch.float32)
