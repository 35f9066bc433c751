"""Fixtures for tests of training."""

from functools import partial

import pytest
import torch

from owl2.train.recipe import Recipe
from owl2.train.run import train
from tests.tiny import ONE_LAYER
from tests.train.runs import quiet
from tests.train.tiny import COLORS, ROWS, SMALL_RUN, make_world


@pytest.fixture
def real_plots():
    """Requested by tests whose runs plot the loss."""


@pytest.fixture(autouse=True)
def skip_plots(request, monkeypatch):
    """Runs do not plot the loss, which takes longer than ten steps of a tiny model."""
    if "real_plots" not in request.fixturenames:
        monkeypatch.setattr("owl2.train.run.plot_loss", lambda *_: True)


@pytest.fixture
def make_recipe(tmp_path):
    """Recipes of a `Owl2Trainer` whose model and data are not read from files."""
    unread = {"model": "unused", "data": [{"dataset": "unused"}], "output": str(tmp_path / "run")}
    own = {"max_steps": 4, "warmup_steps": 0, "min_lr": 1e-4, "logging_steps": 1}
    return lambda **settings: Recipe(**SMALL_RUN | unread | own | settings)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with an untrained checkpoint, images of one color each, and conversations."""
    folder = tmp_path_factory.mktemp("world")
    colors = (COLORS[number % len(COLORS)] for number in range(ROWS))
    answers = [" ".join([color] * (1 + n % 3)) for n, color in enumerate(colors)]
    make_world(folder, answers, **ONE_LAYER)
    return folder


@pytest.fixture(scope="session")
def recipe_in(world):
    """`recipe_in(folder, **settings)` is a recipe of a run in `folder` with the data of `world`."""
    files = {"model": str(world / "start"), "data": [{"file": str(world / "data.json")}]}
    own = files | {"augment": "dihedral", "max_steps": 10}

    def make(folder, **settings):
        return Recipe(**SMALL_RUN | own | {"output": str(folder / "run")} | settings)

    return make


@pytest.fixture
def recipe(recipe_in, tmp_path):
    """Recipes of runs in `tmp_path`."""
    return partial(recipe_in, tmp_path)


@pytest.fixture(scope="session")
def uninterrupted(recipe_in, tmp_path_factory):
    """The result of a run of `recipe()` that was not stopped; read-only."""
    return train(recipe_in(tmp_path_factory.mktemp("uninterrupted")), quiet())


@pytest.fixture
def image_batch():
    """Two rows of ids, one with an image of `tests.tiny`."""
    ids = torch.tensor([[1, 40, 40, 40, 5, 6, 7], [1, 8, 9, 10, 11, 12, 13]])
    labels = ids.masked_fill((ids == 40) | (ids == 1), -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, 8, 8)}
