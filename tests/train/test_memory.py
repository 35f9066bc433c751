"""The memory that a plan says is the memory that a run takes."""

from pathlib import Path

import pytest

from owl2.checkpoints.config_file import read_config
from owl2.errors import InputError
from owl2.model.configuration import Owl2Config
from owl2.train.estimate.hardware import Hardware
from owl2.train.estimate.memory import SampleStatistics, TrainingSetup, Sharding, run_on_meta, prepared_model, batch_shape
from owl2.train.estimate.tracer import MemoryKind
from tests.tiny import make_config
from tests.train.measured import WIDE, make_recipe, make_world, measured_peak

CPU = Hardware.from_options(gpus=0)
FULL = Owl2Config(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    make_world(folder)
    return folder


SLOW = pytest.mark.slow
CASES = [
    pytest.param({}, id="all of it"),
    pytest.param(
        {"dtype": "bfloat16", "gradient_accumulation_steps": 2}, id="bfloat16, 2 pieces", marks=SLOW
    ),
    pytest.param({"gradient_checkpointing": True}, id="activations again", marks=SLOW),
    pytest.param({"stage": 1, "dtype": "bfloat16"}, id="stage 1, bfloat16"),
    pytest.param(
        {"gradient_checkpointing": "selective", "dtype": "bfloat16"}, id="selective, bfloat16"
    ),
    pytest.param(
        {"max_length": 60, "batch_size": 12, "image_size": 30}, id="other sizes", marks=SLOW
    ),
    pytest.param({"lora": {"r": 8}}, id="LoRA"),
    pytest.param({"dtype": "bfloat16"}, id="bfloat16", marks=SLOW),
    pytest.param({"stage": 1, "gradient_checkpointing": True}, id="stage 1, again", marks=SLOW),
    pytest.param(
        {"attn_implementation": "eager", "batch_size": 4}, id="eager attention", marks=SLOW
    ),
    pytest.param({"freeze": ["vision", "decoder"]}, id="parts frozen", marks=SLOW),
    pytest.param(
        {
            "lora": {"r": 4, "parts": ["decoder", "vision"], "modules_to_save": ["abstractor"]},
            "dtype": "bfloat16",
            "gradient_checkpointing": True,
        },
        id="LoRA, bfloat16, again",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize("settings", CASES)
def test_planned_is_measured(folder, tmp_path, monkeypatch, settings):
    recipe = make_recipe(folder, tmp_path / "run", **settings)
    setting = TrainingSetup(read_config(recipe.model), CPU)
    planned = run_on_meta(recipe, setting).memory(Sharding.NONE, 1).total
    measured = measured_peak(recipe, monkeypatch)
    assert planned == pytest.approx(measured, rel=0.15)


def small(tmp_path, **settings):
    return make_recipe(tmp_path, tmp_path / "run", **settings)


def run_of(recipe, machine=CPU, sharding=Sharding.NONE, data=None):
    setting = TrainingSetup(make_config(**WIDE), machine, sharding, data or SampleStatistics())
    return run_on_meta(recipe, setting)


def test_the_optimizer_holds_two_numbers_for_each_that_is_trained(tmp_path):
    memory = run_of(small(tmp_path, stage=1)).memory(Sharding.NONE, 1)
    config = make_config(**WIDE)
    model = prepared_model(small(tmp_path, stage=1), config, half=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.optimizer == 8 * trained
    assert memory.weights >= 4 * sum(p.numel() for p in model.parameters())


def test_sharding_shares_out_what_is_held_for_each_weight(tmp_path):
    recipe = small(tmp_path, dtype="bfloat16", gradient_accumulation_steps=2)
    run = run_of(recipe)
    whole, shared = run.memory(Sharding.NONE, 1), run.memory(Sharding.FSDP2, 4)
    assert shared.weights == whole.weights // 4
    assert shared.optimizer == whole.optimizer // 4
    assert shared.copies == 0 < whole.copies
    assert shared.spread > 0 == whole.spread
    assert run.memory(Sharding.NONE, 4).spread == 4 * run.trained  # DDP's buckets
    assert shared.total < whole.total


def test_zero3_has_16_bits_and_masters(tmp_path):
    recipe = small(tmp_path, dtype="bfloat16")
    machine = Hardware.from_options(gpus=2)
    run = run_of(recipe, machine, Sharding.ZERO3)
    memory = run.memory(Sharding.ZERO3, 2)
    assert memory.copies == 0
    # 2 + 4 bytes each, shared out to two; the fixed position codes are a little more.
    assert memory.weights == pytest.approx(6 * run.trained / 2, rel=0.05)


@pytest.mark.parametrize(("bits", "width"), [("4bit", 0.516), ("8bit", 1.0)])
def test_rounded_weights_are_small(tmp_path, bits, width):
    settings = {"lora": {"r": 2}, "dtype": "bfloat16"}
    plain = run_of(small(tmp_path, **settings)).memory(Sharding.NONE, 1)
    rounded = run_of(small(tmp_path, **settings, quantize=bits)).memory(Sharding.NONE, 1)
    width_, mlp = WIDE["hidden_size"], WIDE["intermediate_size"]
    layer = 2 * width_ * width_ + 4 * width_ * width_ // 2 + 3 * width_ * mlp
    numbers = WIDE["num_hidden_layers"] * layer
    assert plain.weights - rounded.weights == pytest.approx((2 - width) * numbers, rel=1e-3)


def test_packing_with_a_mean_makes_fewer_rows(tmp_path):
    recipe = small(tmp_path, packing=True)
    setting = TrainingSetup(make_config(**WIDE), CPU, data=SampleStatistics(tokens=30))
    assert batch_shape(recipe, setting).rows == 3  # 8 samples of 30 tokens in rows of 96
    assert batch_shape(recipe, setting).images == 8


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    setting = TrainingSetup(make_config(**WIDE), Hardware.from_options(gpus=3))
    with pytest.raises(InputError, match=r"batch_size \(8\) must be a multiple"):
        batch_shape(small(tmp_path), setting)


@pytest.mark.slow
def test_activations_of_the_released_model_as_one_counts_them():
    """With checkpointing a layer leaves its input alone: B x S x 4096 float32 numbers each."""
    recipe = make_recipe(
        Path("unused"),
        Path("unused"),
        gradient_checkpointing=True,
        batch_size=1,
        max_length=512,
        dtype="bfloat16",
    )
    run = run_on_meta(recipe, TrainingSetup(FULL, Hardware.from_options()))
    memory = run.memory(Sharding.NONE, 1)
    assert memory.optimizer == 8 * 8_197_859_328
    inputs = 32 * 512 * 4096 * 4
    # At the end of the forward pass: the inputs, final norm, rotation and the embeddings beside.
    assert inputs < run.trace.memory[:, list(MemoryKind).index(MemoryKind.DECODER)].max() < 1.5 * inputs
