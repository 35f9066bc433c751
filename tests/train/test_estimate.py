"""`owl2 plan`: what a recipe costs, said beforehand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from owl2 import cli
from owl2.errors import InputError
from owl2.model.configuration import Owl2Config
from owl2.train.estimate.estimate import suggest_changes
from owl2.train.estimate.command import count_samples, read_statistics
from owl2.train.estimate.estimate import find_config, estimate_training
from owl2.train.estimate.hardware import MIB, Hardware
from owl2.train.estimate.memory import SampleStatistics, TrainingSetup, Sharding, run_on_meta
from tests.tiny import make_config, make_model
from tests.train.measured import make_recipe

FOLDER = Path("unused")
TOKENS = 3  # of an image
# Few operations, as each plan goes through all of them several times.
SMALL = {
    "max_position_embeddings": 256,
    "num_hidden_layers": 1,
    "vision": {"num_hidden_layers": 1},
    "abstractor": {"num_hidden_layers": 1},
}


def recipe_of(**settings):
    return make_recipe(FOLDER, FOLDER, **settings)


def setting_of(machine=None, data=None, sharding=Sharding.NONE):
    return TrainingSetup(
        make_config(**SMALL), machine or Hardware.from_options(gpus=0, tflops=0.1), sharding, data or SampleStatistics()
    )


def with_memory(size, devices=1):
    return Hardware(devices, "cpu", None, int(size), 0.1)


# ------------------------------------------------------------------ work


def test_a_step_and_the_run():
    recipe = recipe_of(max_steps=5, gradient_accumulation_steps=2, gradient_checkpointing=True)
    plan = estimate_training(recipe, setting_of())
    work = plan.work
    assert (work.samples, work.images, work.steps) == (8, 8, 5)
    assert work.image_tokens == 8 * TOKENS
    assert work.text_tokens == 8 * (96 - TOKENS)
    assert 0 < work.recomputed < work.flops / 3
    assert work.run_flops == 5 * (work.flops + work.recomputed)
    assert plan.hours == pytest.approx(work.run_flops / 0.1e12 / 3600)
    assert (plan.batch.rows, plan.batch.length, plan.batch.passes) == (4, 96, 2)


def test_pieces_and_devices_do_not_change_the_work():
    one = estimate_training(recipe_of(), setting_of()).work
    pieces = estimate_training(recipe_of(gradient_accumulation_steps=4), setting_of()).work
    devices = estimate_training(recipe_of(), setting_of(Hardware(4, "cpu"))).work
    # transformers 5.16 counts a few for positions, once a piece.
    assert pieces.flops == pytest.approx(one.flops, rel=1e-4)
    assert devices.flops == pytest.approx(one.flops, rel=1e-4)


def test_shorter_samples_are_less_work():
    full = estimate_training(recipe_of(), setting_of()).work
    half = estimate_training(recipe_of(), setting_of(data=SampleStatistics(tokens=48, images=0.5))).work
    assert 0.3 < half.flops / full.flops < 0.5  # attention grows with the square
    assert half.images == 4 and half.text_tokens == 8 * 48 - 4 * TOKENS
    text = estimate_training(recipe_of(), setting_of(data=SampleStatistics(tokens=48, images=0))).work
    assert text.image_tokens == 0 and text.flops < half.flops


@pytest.mark.parametrize(
    ("counts", "samples", "steps"),
    [([10, 30], None, 10), ([None, 30], None, None), ([None], 24, 6)],
)
def test_steps_of_epochs(counts, samples, steps):
    data = [{"file": "a.json", "count": count} for count in counts]
    recipe = recipe_of(max_steps=None, epochs=2, data=data)
    plan = estimate_training(recipe, setting_of(data=SampleStatistics(samples=samples)))
    assert plan.work.steps == steps
    assert (plan.hours is None) == (steps is None)


# ------------------------------------------------------------------ memory


def test_all_ways_are_planned():
    plan = estimate_training(recipe_of(), setting_of(Hardware(4, "cpu")))
    assert set(plan.memory) == {
        (way, again) for way in (Sharding.NONE, Sharding.FSDP2) for again in (True, False)
    }
    assert plan.need == plan.memory[Sharding.NONE, False]
    for way in (Sharding.NONE, Sharding.FSDP2):
        assert plan.memory[way, True].total < plan.memory[way, False].total


def test_selective_checkpointing_stands_beside_all_and_nothing():
    plan = estimate_training(recipe_of(gradient_checkpointing="selective"), setting_of())
    least, chosen, most = (
        plan.memory[Sharding.NONE, how].total for how in (True, "selective", False)
    )
    assert plan.need.total == chosen and least < chosen < most
    assert plan.work.recomputed == 0  # no product is


def test_whether_it_fits():
    plan = estimate_training(recipe_of(), setting_of())
    need = plan.need.total
    assert plan.fits is None
    for room, fits in ((need / 0.9, True), (need, False)):
        roomy = replace(plan, setting=setting_of(with_memory(room)))
        assert roomy.fits is fits
    assert suggest_changes(plan) == []


@pytest.mark.slow
def test_advice_is_true():
    """Each change, made, gives a plan that fits."""
    one = recipe_of(batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    least = run_on_meta(one, setting_of()).memory(Sharding.NONE, 2).total
    machine = with_memory(1.3 * least, devices=2)
    plan = estimate_training(recipe_of(), setting_of(machine))
    assert plan.fits is False
    found = suggest_changes(plan)
    assert found
    assert any("--sharding fsdp2" in piece.change for piece in found)
    for piece in found:
        words = piece.change.split()
        way = Sharding.NONE
        if "--sharding" in words:
            words = [word for word in words if word not in ("--sharding", "fsdp2")]
            way = Sharding.FSDP2
        settings = dict(word.split("=", 1) for word in words)
        changed = recipe_of(**{key: yaml.safe_load(value) for key, value in settings.items()})
        need = run_on_meta(changed, setting_of(machine, sharding=way)).memory(way, 2).total
        assert need == piece.total and machine.holds(need), piece
        assert changed.gradient_checkpointing


def test_smaller_pieces_are_no_smaller_than_needed():
    tight = estimate_training(recipe_of(gradient_checkpointing=True, batch_size=16), setting_of())
    machine = with_memory(0.8 * tight.need.total / 0.92)
    plan = replace(tight, setting=setting_of(machine))
    pieces = suggest_changes(plan)[0]
    assert pieces.change == "gradient_accumulation_steps=2"


def test_nothing_helps_where_there_is_no_room():
    plan = estimate_training(recipe_of(), setting_of(with_memory(MIB / 50)))
    assert plan.fits is False and suggest_changes(plan) == []


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "data", "words"),
    [
        ({"max_length": 300}, SampleStatistics(), "more than the model's 256 positions"),
        ({"max_length": 3}, SampleStatistics(), "no room for words"),
        ({"batch_size": 3, "gradient_accumulation_steps": 3}, SampleStatistics(tokens=97), "--tokens is 97"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, data, words):
    with pytest.raises(InputError, match=words):
        estimate_training(recipe_of(**settings), setting_of(data=data))


def test_a_model_that_is_not_there_yet_has_the_released_sizes(tmp_path):
    config, origin = find_config(recipe_of(), None)
    assert config.to_dict() == Owl2Config().to_dict()
    assert "released sizes" in origin and "unused/start" in origin
    make_model().save_pretrained(tmp_path)
    config, origin = find_config(recipe_of(), str(tmp_path))
    assert (config.hidden_size, origin) == (16, str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError):
        find_config(recipe_of(model=str(tmp_path)), None)


def test_statistics(tmp_path):
    file = tmp_path / "statistics.json"
    counted = {"usable": 70, "tokens": {"mean": 120.5}, "images": {"mean": 0.5}}
    file.write_text(json.dumps({"all": counted}), encoding="utf-8")
    assert read_statistics(file, 200) == SampleStatistics(120.5, 0.5, 70)
    assert read_statistics(file, 96).tokens == 96
    for content in ("[]", "{", '{"all": {"usable": 0, "tokens": {}, "images": {}}}'):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="is no statistics"):
            read_statistics(file, 200)
    with pytest.raises(InputError, match="cannot be read"):
        read_statistics(tmp_path / "none", 200)


# ------------------------------------------------------------------ the command


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["owl2", "plan", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def recipe_file(tmp_path):
    make_model(**SMALL).save_pretrained(tmp_path / "start")
    file = tmp_path / "recipe.yaml"
    recipe = recipe_of(model=str(tmp_path / "start"), data=[{"dataset": "easy_vqa", "count": 99}])
    file.write_text(
        yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)), encoding="utf-8"
    )
    return file


def test_the_command(monkeypatch, capsys, recipe_file, tmp_path):
    numbers = tmp_path / "plan.json"
    need = run_on_meta(recipe_of(), setting_of()).memory(Sharding.NONE, 1).total
    code, out, _ = run(
        monkeypatch, capsys, recipe_file, "--gpus", 0, "--gpu-memory", need, "--json", numbers
    )
    assert code == 0
    for words in ("decoder: visual", "optimizer states", "no checkpointing ◄", "Does not fit"):
        assert words in out
    assert "The largest piece: activations, decoder" in out
    plan = json.loads(numbers.read_text(encoding="utf-8"))
    assert plan["fits"] is False and plan["advice"] and plan["total"] == need
    assert plan["advice"][0]["change"].startswith("gradient_checkpointing=selective")
    assert plan["advice"][0]["change"].split("   ")[0] in out
    assert sum(plan["parameters"].values()) == sum(plan["trained"].values())
    chosen = [m for m in plan["memory"] if not m["gradient_checkpointing"]]
    assert chosen[0]["total"] == plan["total"] == sum(chosen[0]["pieces"].values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "abacus"], "'abacus' is no GPU"),
        (["--gpu-memory", "lots"], "write it as 80G"),
        (["--sharding", "fsdp2"], "needs several devices"),
        (["--sharding", "all"], "'all' is no sharding"),
        (["--gpus", "3"], "must be a multiple of devices"),
        (["--config-from", "nowhere"], "nowhere"),
        (["--statistics", "nowhere.json"], "nowhere.json cannot be read"),
        (["lerning_rate=1"], "learning_rate"),
    ],
)
def test_the_command_refuses(monkeypatch, capsys, recipe_file, arguments, words):
    code, _, err = run(monkeypatch, capsys, recipe_file, *arguments)
    assert code == 2 and words in err and "Traceback" not in err


def test_rows_at_hand_are_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n" * 70, encoding="utf-8")
    known = [{"file": str(tmp_path / "rows.jsonl")}, {"file": "elsewhere.json", "count": 30}]
    assert count_samples(recipe_of(max_steps=None, epochs=2, data=known)) == 100
    unknown = [*known, {"file": "elsewhere.json"}]
    assert count_samples(recipe_of(max_steps=None, epochs=2, data=unknown)) is None
