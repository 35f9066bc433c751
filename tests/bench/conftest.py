"""Fixtures of the benchmark tests: a model with different weights per modality, and inputs."""

import pytest
import torch

from owl2.bench.baseline import as_baseline
from owl2.bench.workload import Workload
from tests.model.conftest import make_modalities_differ
from tests.tiny import make_model


@pytest.fixture(params=[True, False], ids=["mam", "no mam"])
def model(request):
    """A tiny model with grouped-query attention and two learnable queries."""
    model = make_model(use_mam=request.param).eval()
    make_modalities_differ(model)
    return model


@pytest.fixture
def baseline(model):
    return as_baseline(model)


@pytest.fixture
def workload(model):
    return Workload(model.config, torch.device("cpu"), torch.float32)
