"""The estimated memory is the measured memory of a run."""

import shutil
from pathlib import Path

import pytest
import torch

from owl2.checkpoints.config_file import read_config
from owl2.errors import ErrorCode
from owl2.model.configuration import Owl2Config
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from owl2.train.estimate.hardware import Hardware
from owl2.train.estimate.memory import (
    SampleStatistics,
    Sharding,
    TrainingSetup,
    batch_shape,
    prepared_model,
    run_on_meta,
)
from owl2.train.estimate.tracer import MemoryKind
from tests.errors import raises_input_error
from tests.tiny import make_config
from tests.train.measured import SHALLOW, make_recipe, make_wide_world, measured_peak
from tests.train.runs import load_model

CPU = Hardware.from_options(gpus=0)
FULL = Owl2Config(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    make_wide_world(folder)
    return folder


SLOW = pytest.mark.slow
CASES = [
    pytest.param({}, id="full", marks=SLOW),
    pytest.param(
        {"dtype": "bfloat16", "gradient_accumulation_steps": 2},
        id="bfloat16, 2 micro-batches",
        marks=SLOW,
    ),
    pytest.param({"gradient_checkpointing": True}, id="checkpointing", marks=SLOW),
    pytest.param({"stage": 1, "dtype": "bfloat16"}, id="stage 1, bfloat16", marks=SLOW),
    pytest.param(
        {"gradient_checkpointing": "selective", "dtype": "bfloat16"}, id="selective, bfloat16"
    ),
    pytest.param(
        {"max_length": 60, "batch_size": 12, "image_size": 30}, id="other sizes", marks=SLOW
    ),
    pytest.param({"lora": {"r": 8}}, id="LoRA"),
    pytest.param({"dtype": "bfloat16"}, id="bfloat16", marks=SLOW),
    pytest.param(
        {"stage": 1, "gradient_checkpointing": True}, id="stage 1, checkpointing", marks=SLOW
    ),
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
        id="LoRA, bfloat16, checkpointing",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize("settings", CASES)
def test_estimated_memory_equals_measured_memory(folder, tmp_path, monkeypatch, settings):
    recipe = make_recipe(folder, tmp_path / "run", **settings)
    setup = TrainingSetup(read_config(recipe.model), CPU)
    estimated = run_on_meta(recipe, setup).memory(Sharding.NONE, 1).total()
    measured = measured_peak(recipe, monkeypatch)
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_estimated_memory_of_a_quantized_checkpoint(folder, tmp_path, monkeypatch, dtype):
    """Its file has 16-bit weights, as the released checkpoint."""
    half = shutil.copytree(folder / "start", tmp_path / "half")
    load_model(half, dtype=torch.bfloat16).save_pretrained(half)
    quantized = quantize_checkpoint(half, tmp_path / "quantized")
    recipe = make_recipe(
        folder,
        tmp_path / "run",
        model=str(quantized),
        lora={"r": 8},
        gradient_checkpointing=True,
        dtype=dtype,
    )
    setup = TrainingSetup(read_config(recipe.model), CPU)
    memory = run_on_meta(recipe, setup).memory(Sharding.NONE, 1)
    assert memory.total() == pytest.approx(measured_peak(recipe, monkeypatch), rel=0.15)
    plain = run_on_meta(recipe, TrainingSetup(read_config(half), CPU)).memory(Sharding.NONE, 1)
    assert memory[MemoryKind.WEIGHTS] < 0.6 * plain[MemoryKind.WEIGHTS]


def small(tmp_path, **settings):
    return make_recipe(tmp_path, tmp_path / "run", **settings)


def run_of(recipe, hardware=CPU, sharding=Sharding.NONE, data=None):
    setup = TrainingSetup(make_config(**SHALLOW), hardware, sharding, data or SampleStatistics())
    return run_on_meta(recipe, setup)


def test_optimizer_has_two_states_per_trainable_parameter(tmp_path):
    memory = run_of(small(tmp_path, stage=1)).memory(Sharding.NONE, 1)
    config = make_config(**SHALLOW)
    model = prepared_model(small(tmp_path, stage=1), config, half=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory[MemoryKind.OPTIMIZER] == 8 * trained
    assert memory[MemoryKind.WEIGHTS] >= 4 * sum(p.numel() for p in model.parameters())


def test_sharding_divides_weights_and_optimizer_states(tmp_path):
    recipe = small(tmp_path, dtype="bfloat16", gradient_accumulation_steps=2)
    run = run_of(recipe)
    full, sharded = run.memory(Sharding.NONE, 1), run.memory(Sharding.FSDP2, 4)
    assert sharded[MemoryKind.WEIGHTS] == full[MemoryKind.WEIGHTS] // 4
    assert sharded[MemoryKind.OPTIMIZER] == full[MemoryKind.OPTIMIZER] // 4
    assert sharded[MemoryKind.COPIES] == 0 < full[MemoryKind.COPIES]
    assert sharded[MemoryKind.COMMUNICATION] > 0 == full[MemoryKind.COMMUNICATION]
    ddp = run.memory(Sharding.NONE, 4)
    assert ddp[MemoryKind.COMMUNICATION] == 4 * run.trainable  # the buckets
    assert sharded.total() < full.total()


def test_zero3_has_16_bit_weights_and_float32_masters(tmp_path):
    recipe = small(tmp_path, dtype="bfloat16")
    hardware = Hardware.from_options(gpus=2)
    run = run_of(recipe, hardware, Sharding.ZERO3)
    memory = run.memory(Sharding.ZERO3, 2)
    assert memory[MemoryKind.COPIES] == 0
    # 2 + 4 bytes each over two devices, and the position embeddings of the abstractor.
    assert memory[MemoryKind.WEIGHTS] == pytest.approx(6 * run.trainable / 2, rel=0.05)


@pytest.mark.parametrize(("bits", "width"), [("4bit", 0.516), ("8bit", 1.0)])
def test_quantized_weights_take_fewer_bytes(tmp_path, bits, width):
    settings = {"lora": {"r": 2}, "dtype": "bfloat16"}
    plain = run_of(small(tmp_path, **settings)).memory(Sharding.NONE, 1)
    quantized = run_of(small(tmp_path, **settings, quantize=bits)).memory(Sharding.NONE, 1)
    width_, mlp = SHALLOW["hidden_size"], SHALLOW["intermediate_size"]
    layer = 2 * width_ * width_ + 4 * width_ * width_ // 2 + 3 * width_ * mlp
    weights = SHALLOW["num_hidden_layers"] * layer
    assert plain[MemoryKind.WEIGHTS] - quantized[MemoryKind.WEIGHTS] == pytest.approx(
        (2 - width) * weights, rel=1e-3
    )


def test_packing_with_mean_lengths_has_fewer_rows(tmp_path):
    recipe = small(tmp_path, packing=True)
    setup = TrainingSetup(make_config(**SHALLOW), CPU, data=SampleStatistics(tokens=30))
    assert batch_shape(recipe, setup).rows == 3  # 8 samples of 30 tokens in rows of 96
    assert batch_shape(recipe, setup).images == 8


def test_eager_attention_keeps_its_weights(tmp_path):
    required = {
        name: run_of(small(tmp_path, attn_implementation=name)).memory(Sharding.NONE, 1).total()
        for name in ("eager", "sdpa", "flash_attention_2")
    }
    recipe = small(tmp_path)
    pairs = recipe.batch_size * SHALLOW["num_attention_heads"] * recipe.max_length**2
    assert required["eager"] - required["sdpa"] > 4 * pairs  # at least the weights in float32
    assert required["flash_attention_2"] == required["sdpa"]


def test_indivisible_batch_is_refused(tmp_path):
    setup = TrainingSetup(make_config(**SHALLOW), Hardware.from_options(gpus=3))
    with raises_input_error(ErrorCode.CONFLICT, "batch_size (8)"):
        batch_shape(small(tmp_path), setup)


@pytest.mark.slow
def test_activations_of_the_released_model_counted_by_hand():
    """With checkpointing a layer saves only its input, B x S x 4096 float32 values."""
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
    assert memory[MemoryKind.OPTIMIZER] == 8 * 8_197_859_328
    inputs = 32 * 512 * 4096 * 4
    # At the end of the forward pass: the inputs, the final norm, rotations and embeddings.
    assert (
        inputs
        < run.trace.memory[:, list(MemoryKind).index(MemoryKind.DECODER)].max()
        < 1.5 * inputs
    )
