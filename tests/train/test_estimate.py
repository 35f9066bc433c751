"""`owl2 plan`: estimates of memory, FLOPs and time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig
from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.processing.anchor_crops import ANCHORS
from owl2.train.estimate.command import count_samples, find_config, read_statistics
from owl2.train.estimate.estimate import estimate_training, suggest_changes
from owl2.train.estimate.hardware import MIB, USABLE_FRACTION, Hardware
from owl2.train.estimate.memory import (
    SampleStatistics,
    Sharding,
    TrainingSetup,
    batch_shape,
    run_on_meta,
)
from owl2.train.estimate.tracer import MemoryKind
from tests.errors import raises_input_error
from tests.tiny import ONE_LAYER, make_config, make_model
from tests.train.measured import make_recipe

FOLDER = Path("unused")
IMAGE_TOKENS = 3
SMALL = ONE_LAYER | {"max_position_embeddings": 256}


# The trace of a step depends on neither of these, or only through the shape of its batch.
NOT_TRACED = {"model", "output", "data", "max_steps", "epochs"}
NOT_TRACED |= {"batch_size", "gradient_accumulation_steps", "max_length", "packing"}
SAVED = {"architectures", "dtype", "_name_or_path", "transformers_version"}  # of a saved model


@pytest.fixture(scope="module", autouse=True)
def trace_equal_steps_once():
    """A trace takes a second, and most estimates need the same ones."""
    traced = {}

    def run_once(recipe, setup):
        settings = recipe.model_dump_json(exclude=NOT_TRACED)
        key = settings, setup.hardware.device_type, setup.sharding, batch_shape(recipe, setup)
        values = setup.config.to_dict()
        key += (str({name: values[name] for name in sorted(values.keys() - SAVED)}),)
        if key not in traced:
            traced[key] = run_on_meta(recipe, setup)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("owl2.train.estimate.estimate.run_on_meta", run_once)
        yield


def recipe_of(**settings):
    return make_recipe(FOLDER, FOLDER, **settings)


def setup_of(hardware=None, data=None, sharding=Sharding.NONE):
    hardware = hardware or Hardware.from_options(gpus=0, tflops=0.1)
    return TrainingSetup(make_config(**SMALL), hardware, sharding, data or SampleStatistics())


@pytest.fixture(scope="module")
def estimate():
    return estimate_training(recipe_of(), setup_of())


@pytest.fixture(scope="module")
def four_devices():
    return estimate_training(recipe_of(), setup_of(Hardware(4, "cpu")))


def test_pairs_double_the_rows_of_a_batch():
    plain, pairs = (batch_shape(recipe_of(loss=loss), setup_of()) for loss in (None, {}))
    assert (pairs.rows, pairs.images) == (2 * plain.rows, 2 * plain.images)


def with_memory(size, devices=1):
    return Hardware(devices, "cpu", None, int(size), 0.1)


# ------------------------------------------------------------------ computation


def test_computation_of_a_step_and_the_run():
    recipe = recipe_of(max_steps=5, gradient_accumulation_steps=2, gradient_checkpointing=True)
    estimate = estimate_training(recipe, setup_of())
    compute = estimate.compute
    assert (compute.samples, compute.images, compute.steps) == (8, 8, 5)
    assert compute.image_tokens == 8 * IMAGE_TOKENS
    assert compute.text_tokens == 8 * (96 - IMAGE_TOKENS)
    assert 0 < compute.recomputed_flops < compute.flops / 3
    assert compute.run_flops == 5 * (compute.flops + compute.recomputed_flops)
    assert estimate.hours == pytest.approx(compute.run_flops / 0.1e12 / 3600)
    batch = estimate.batch
    assert (batch.rows, batch.length, batch.micro_batches) == (4, 96, 2)


def test_flops_do_not_depend_on_micro_batches_and_devices(estimate, four_devices):
    flops = estimate.compute.flops
    accumulated = estimate_training(recipe_of(gradient_accumulation_steps=4), setup_of()).compute
    # transformers 5.16 computes some positions once per micro-batch.
    assert accumulated.flops == pytest.approx(flops, rel=1e-4)
    assert four_devices.compute.flops == pytest.approx(flops, rel=1e-4)


def test_shorter_samples_have_fewer_flops(estimate):
    data = SampleStatistics(tokens=48, images=0.5)
    half = estimate_training(recipe_of(), setup_of(data=data)).compute
    assert 0.3 < half.flops / estimate.compute.flops < 0.5  # attention is quadratic
    assert half.images == 4 and half.text_tokens == 8 * 48 - 4 * IMAGE_TOKENS
    data = SampleStatistics(tokens=48, images=0)
    text = estimate_training(recipe_of(), setup_of(data=data)).compute
    assert text.image_tokens == 0 and text.flops < half.flops


@pytest.mark.parametrize(("samples", "steps"), [(40, 10), (None, None)])
def test_steps_of_epochs(samples, steps):
    recipe = recipe_of(max_steps=None, epochs=2)
    estimate = estimate_training(recipe, setup_of(data=SampleStatistics(samples=samples)))
    assert estimate.compute.steps == steps
    assert (estimate.hours is None) == (steps is None)


# ------------------------------------------------------------------ memory


def test_memory_is_estimated_for_all_variants(four_devices):
    shardings = (Sharding.NONE, Sharding.FSDP2)
    assert set(four_devices.memory) == {(way, mode) for way in shardings for mode in (True, False)}
    assert four_devices.required == four_devices.memory[Sharding.NONE, False]
    for sharding in shardings:
        checkpointed, saved = (four_devices.memory[sharding, mode] for mode in (True, False))
        assert checkpointed.total() < saved.total()


def test_selective_checkpointing_is_between_full_and_none():
    estimate = estimate_training(recipe_of(gradient_checkpointing="selective"), setup_of())
    least, chosen, most = (
        estimate.memory[Sharding.NONE, mode].total() for mode in (True, "selective", False)
    )
    assert estimate.required.total() == chosen and least < chosen < most
    assert estimate.compute.recomputed_flops == 0  # no matrix product is recomputed


def test_fits_compares_with_the_usable_memory(estimate):
    required = estimate.required.total()
    assert estimate.fits is None
    for memory, fits in ((required / 0.9, True), (required, False)):
        limited = replace(estimate, setup=setup_of(with_memory(memory)))
        assert limited.fits is fits
    assert suggest_changes(estimate) == []


@pytest.mark.slow
def test_suggested_changes_fit():
    one = recipe_of(batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    least = run_on_meta(one, setup_of()).memory(Sharding.NONE, 2).total()
    hardware = with_memory(1.3 * least, devices=2)
    estimate = estimate_training(recipe_of(), setup_of(hardware))
    assert estimate.fits is False
    suggestions = suggest_changes(estimate)
    assert any("--sharding fsdp2" in suggestion.change for suggestion in suggestions)
    for suggestion in suggestions:
        arguments = suggestion.change.split()
        sharding = Sharding.NONE
        if "--sharding" in arguments:
            arguments = [a for a in arguments if a not in ("--sharding", "fsdp2")]
            sharding = Sharding.FSDP2
        settings = dict(argument.split("=", 1) for argument in arguments)
        changed = recipe_of(**{key: yaml.safe_load(value) for key, value in settings.items()})
        run = run_on_meta(changed, setup_of(hardware, sharding=sharding))
        required = run.memory(sharding, 2).total()
        assert required == suggestion.total and hardware.fits(required), suggestion
        assert changed.gradient_checkpointing


def test_suggested_micro_batch_is_the_largest_that_fits():
    recipe = recipe_of(gradient_checkpointing=True, batch_size=16, stage=1)
    estimate = estimate_training(recipe, setup_of())
    process = estimate.required[MemoryKind.PROCESS]
    size = process + 0.8 * (estimate.required.total() - process)
    estimate = replace(estimate, setup=setup_of(with_memory(size / USABLE_FRACTION)))
    assert suggest_changes(estimate)[0].change == "gradient_accumulation_steps=2"


def test_no_change_is_suggested_if_none_fits(estimate):
    tight = replace(estimate, setup=setup_of(with_memory(MIB / 50)))
    assert tight.fits is False and suggest_changes(tight) == []


def quantized_setup(**options):
    config = make_config(**SMALL)
    config.quantization_config = Owl2QuantizationConfig(4)
    return replace(setup_of(**options), config=config)


@pytest.mark.parametrize("is_stored", [True, False])
def test_quantized_weights_are_not_sharded(is_stored):
    """Neither in the table nor in a suggestion, and they are quantized once."""
    setup = (quantized_setup if is_stored else setup_of)(hardware=Hardware(2, "cpu"))
    recipe = recipe_of(lora={"r": 2}, quantize=None if is_stored else "4bit")
    estimate = estimate_training(recipe, setup)
    assert {way for way, _ in estimate.memory} == {Sharding.NONE}
    process = estimate.required[MemoryKind.PROCESS]
    size = process + 0.9 * (estimate.required.total() - process)
    hardware = with_memory(size / USABLE_FRACTION, devices=2)
    suggestions = suggest_changes(replace(estimate, setup=replace(setup, hardware=hardware)))
    assert suggestions
    assert not any("quantize" in one.change or "shard" in one.change for one in suggestions)


def test_frozen_weights_are_in_float32_with_fsdp2():
    recipe = recipe_of(lora={"r": 2}, dtype="bfloat16")
    estimate = estimate_training(recipe, setup_of(Hardware(4, "cpu"), sharding=Sharding.FSDP2))
    size = sum(estimate.trainable.sizes.values())
    assert estimate.required[MemoryKind.WEIGHTS] >= 4 * size // 4
    weights = estimate.memory[Sharding.NONE, recipe.gradient_checkpointing][MemoryKind.WEIGHTS]
    assert 2 * size < weights < 4 * size


# ------------------------------------------------------------------ inputs


def test_a_page_of_docowl2_has_crops():
    config = make_config(**SMALL, member="mplug_docowl2")
    estimate = estimate_training(recipe_of(), replace(setup_of(), config=config))
    crops = 1 + max(rows * columns for rows, columns in ANCHORS["grid_12"])
    pixels = crops * 3 * config.image_size**2 * 4  # bytes
    assert estimate.required[MemoryKind.BATCH] >= estimate.batch.images * pixels


@pytest.mark.parametrize(
    ("settings", "data", "code", "needle"),
    [
        ({"max_length": 300}, SampleStatistics(), ErrorCode.TOO_LONG, "256 positions"),
        ({"max_length": 3}, SampleStatistics(), ErrorCode.TOO_LONG, "max_length (3)"),
        (
            {"batch_size": 3, "gradient_accumulation_steps": 3},
            SampleStatistics(tokens=97),
            ErrorCode.INVALID_VALUE,
            "--tokens is 97",
        ),
        ({}, SampleStatistics(tokens=3), ErrorCode.INVALID_VALUE, "--tokens is 3"),
    ],
)
def test_conflicting_inputs_are_refused(settings, data, code, needle):
    with raises_input_error(code, needle):
        estimate_training(recipe_of(**settings), setup_of(data=data))


@pytest.mark.parametrize(
    ("settings", "sharding", "is_stored"),
    [
        ({}, Sharding.NONE, True),
        ({"lora": {"r": 2}, "quantize": "4bit"}, Sharding.NONE, True),
        ({"lora": {"r": 2}}, Sharding.FSDP2, True),
        ({"lora": {"r": 2}, "quantize": "4bit"}, Sharding.ZERO3, False),
    ],
)
def test_what_training_refuses_for_quantized_weights(settings, sharding, is_stored):
    make = quantized_setup if is_stored else setup_of
    setup = make(hardware=Hardware(2, "cpu"), sharding=sharding)
    with raises_input_error(ErrorCode.CONFLICT):
        estimate_training(recipe_of(**settings), setup)


def test_missing_model_has_the_released_sizes(tmp_path):
    config, origin = find_config(recipe_of(), None)
    assert config.to_dict() == Owl2Config().to_dict()
    assert "released sizes" in origin and "unused/start" in origin
    make_model().save_pretrained(tmp_path)
    config, origin = find_config(recipe_of(), str(tmp_path))
    assert (config.hidden_size, origin) == (16, str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError):
        find_config(recipe_of(model=str(tmp_path)), None)


def test_statistics_of_data_check_are_read(tmp_path):
    file = tmp_path / "statistics.json"
    counted = {"usable": 70, "tokens": {"mean": 120.5}, "images": {"mean": 0.5}}
    file.write_text(json.dumps({"all": counted}), encoding="utf-8")
    assert read_statistics(file, 200) == SampleStatistics(120.5, 0.5, 70)
    assert read_statistics(file, 96).tokens == 96
    for content in ("[]", "{", '{"all": {"usable": 0, "tokens": {}, "images": {}}}'):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError) as error:
            read_statistics(file, 200)
        assert str(file) in str(error.value)
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, tmp_path / "none"):
        read_statistics(tmp_path / "none", 200)


def test_present_samples_are_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n" * 70, encoding="utf-8")
    known = [{"file": str(tmp_path / "rows.jsonl")}, {"file": "elsewhere.json", "count": 30}]
    assert count_samples(recipe_of(max_steps=None, epochs=2, data=known)) == 100
    unknown = [*known, {"file": "elsewhere.json"}]
    assert count_samples(recipe_of(max_steps=None, epochs=2, data=unknown)) is None


# ------------------------------------------------------------------ the command


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    make_model(**SMALL).save_pretrained(tmp_path / "start")
    file = tmp_path / "recipe.yaml"
    recipe = recipe_of(model=str(tmp_path / "start"), data=[{"dataset": "easy_vqa", "count": 99}])
    settings = recipe.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def test_plan_prints_and_writes_the_estimate(run_cli, recipe_file, estimate, tmp_path):
    output_file = tmp_path / "plan.json"
    required = estimate.required.total()
    memory = int(required / USABLE_FRACTION) - 1  # one byte too few
    hardware = ("--gpus", 0, "--gpu-memory", memory)
    result = run_cli("plan", recipe_file, *hardware, "--output-file", output_file)
    assert result.exit_code == 0
    for text in ("decoder: visual", "optimizer states", "no checkpointing ◄", "Does not fit"):
        assert text in result.stdout
    assert "Largest item: activations, decoder" in result.stdout
    plan = json.loads(output_file.read_text(encoding="utf-8"))
    assert plan["fits"] is False and plan["total"] == required
    change = plan["suggestions"][0]["change"]
    assert change.startswith("gradient_checkpointing=selective") and change in result.stdout
    assert sum(plan["parameters"].values()) == sum(plan["trainable"].values())
    [chosen] = [m for m in plan["memory"] if not m["gradient_checkpointing"]]
    assert chosen["total"] == plan["total"] == sum(chosen["breakdown"].values())


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--gpu", "abacus"], "abacus"),
        (["--gpu-memory", "lots"], "80G"),
        (["--sharding", "fsdp2"], "--gpus"),
        (["--sharding", "all"], "'all'"),
        (["--gpus", "3"], "batch_size"),
        (["--config-from", "nowhere"], "nowhere"),
        (["--statistics", "nowhere.json"], "nowhere.json"),
        (["lerning_rate=1"], "learning_rate"),
    ],
)
def test_plan_exits_with_2_for_invalid_arguments(run_cli, recipe_file, arguments, needle):
    result = run_cli("plan", recipe_file, *arguments)
    assert result.exit_code == 2 and needle in result.stderr and "Traceback" not in result.stderr
