"""Two processes on CPUs: they compute what one computes, stop together, and save one model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.distributed import DistributedContext
from owl2.train.recipe import Recipe
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.tiny import make_model
from tests.train.processes import FSDP, owl2, run, start
from tests.train.runs import quiet, weights
from tests.train.tiny import COLORS, QUESTION

ROOT = Path(__file__).parents[2]
SHARDINGS = {"DDP": {}, "FSDP2": FSDP}
# Next to no rate, so that the gradients of all steps are of the same weights, and no clipping.
STILL = {"learning_rate": 1e-9, "min_lr": 0.0, "max_grad_norm": 1e9, "max_steps": 3}
CASES = {"stage 2": {}, "stage 1": {"stage": 1}}
MORE = {
    "in pieces": {
        "gradient_accumulation_steps": 2,
        "batch_size": 4,
        "gradient_checkpointing": True,
    },
    "packed": {"packing": True, "batch_size": 4},
    "tied": {"model": "tied"},
    "LoRA": {"lora": {"r": 2, "parts": ["decoder", "vision"], "modules_to_save": ["abstractor"]}},
}


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """Settings of a run on images and on words alone, a sample a process and step."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for number in range(24):
        color = COLORS[number % len(COLORS)]
        asked, row = QUESTION, {}
        if number % 2:
            asked, row = f"<image>\n{QUESTION}", {"image": str(world / f"{number}.png")}
        answer = " ".join([color] * (1 + number % 5))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        rows.append(row | {"conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    tied = folder / "tied"
    old = Owl2ForConditionalGeneration.from_pretrained(world / "start")
    make_model(vocab_size=old.config.vocab_size, tie_word_embeddings=True).save_pretrained(tied)
    for path in (world / "start").iterdir():
        if not (tied / path.name).exists():
            (tied / path.name).write_bytes(path.read_bytes())
    return {
        "model": str(world / "start"),
        "stage": 2,
        "data": [{"file": str(folder / "data.json"), "images": "/"}],
        "image_size": None,
        "augment": "none",
        "max_steps": 5,
        "batch_size": 2,
        "seed": 2,  # whose first steps have images in the one, in the other, in both
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dtype": "float32",
        "logging_steps": 1,
        "save_steps": None,
    }, tied


def keep_gradients(folder, recipes):
    """Train by each recipe; keep the gradients of every step, and whether it had images."""
    kept = []
    norm, step = Owl2Trainer._get_grad_norm, Owl2Trainer.training_step
    images = []

    def keep_norm(self, model, grad_norm=None):
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                found[name] = whole.clone()
        loss = self.context.all_reduce_sum(float(self._step_loss))[0] / self.context.world_size
        total = norm(self, model, grad_norm)
        kept.append({"gradients": found, "loss": loss, "norm": float(total)})
        kept[-1]["images"] = list(images)
        images.clear()
        return total

    def keep_images(self, model, inputs, *args, **kwargs):
        images.append(len(inputs.get("pixel_values", ())))
        return step(self, model, inputs, *args, **kwargs)

    Owl2Trainer._get_grad_norm, Owl2Trainer.training_step = keep_norm, keep_images
    with DistributedContext.open() as context:
        for name, recipe in recipes.items():
            kept.clear()
            train(recipe, quiet())
            torch.save(kept, folder / f"{name} {context.rank} of {context.world_size}.pt")


@pytest.fixture(scope="module")
def gradients(mixed, tmp_path_factory):
    """`keep_gradients` of some cases, by 1 process or 2 in a way; gives where it kept them."""
    settings, tied = mixed
    places = {}

    def keep(sharding, cases):
        key = (sharding, *cases)
        if key not in places:
            place = places[key] = tmp_path_factory.mktemp("gradients")
            recipes = {}
            for name, case in cases.items():
                case = case | ({"model": str(tied)} if case.get("model") else {})
                output = {"output": str(place / name)}
                recipes[name] = Recipe(**settings | STILL | case | output)
            environment = SHARDINGS.get(sharding)
            count = 1 if environment is None else 2
            run(place, keep_gradients, place, recipes, count=count, environment=environment)
        return places[key]

    return keep


def assert_those_of_one(gradients, sharding, case, cases):
    one = torch.load(gradients("one", cases) / f"{case} 0 of 1.pt")
    place = gradients(sharding, cases)
    two = [torch.load(place / f"{case} {rank} of 2.pt") for rank in range(2)]
    if cases[case].get("batch_size") is None:
        # One with images beside one without, both ways round: what could hang.
        shares = [tuple(bool(sum(s["images"])) for s in step) for step in zip(*two, strict=True)]
        assert shares == [(False, True), (True, False), (True, True)]
    for expected, found in zip(one, two[0], strict=True):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["norm"], expected["norm"], rtol=1e-5, atol=1e-6)
        assert expected["gradients"].keys() <= found["gradients"].keys()
        for name, gradient in found["gradients"].items():
            alone = expected["gradients"].get(name)
            if alone is None:  # a step without images, so nothing to learn for it
                assert not gradient.any(), name
            else:
                torch.testing.assert_close(gradient, alone, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("case", "sharding"),
    [
        ("stage 1", "DDP"),
        ("stage 2", "FSDP2"),
        pytest.param("stage 1", "FSDP2", marks=pytest.mark.slow),
        pytest.param("stage 2", "DDP", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_losses_and_gradients_of_one(gradients, case, sharding):
    assert_those_of_one(gradients, sharding, case, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("case", MORE)
def test_the_same_in_pieces_packed_tied_and_with_adapters(gradients, case, sharding):
    assert_those_of_one(gradients, sharding, case, MORE)


def look_between_pieces(recipe):
    """Train; losses and sums of gradients are in float32, and each process holds its share."""
    step = Owl2Trainer.training_step

    def looked_at(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        policies = {
            module._get_fsdp_state()._mp_policy
            for module in model.modules()
            if hasattr(module, "_get_fsdp_state")
        }
        assert {(p.param_dtype, p.reduce_dtype, p.output_dtype) for p in policies} == {
            (torch.bfloat16, torch.float32, None)
        }
        assert loss.dtype == torch.float32
        assert float(loss) != float(loss.bfloat16())
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, f"{name} holds no share of its gradient"
            assert gradient.to_local().dtype == torch.float32
            assert gradient.to_local().shape == parameter.to_local().shape
        return loss

    Owl2Trainer.training_step = looked_at
    train(recipe, quiet())


@pytest.mark.slow
def test_fsdp2_in_bfloat16_adds_up_in_float32_and_holds_shares(mixed, tmp_path):
    settings, _ = mixed
    pieces = {
        "dtype": "bfloat16",
        "gradient_accumulation_steps": 2,
        "batch_size": 4,
        "max_steps": 2,
    }
    looks = {"validation": {"data": settings["data"], "max_samples": 3, "num_generations": 1}}
    recipe = Recipe(**settings | pieces | looks, output=str(tmp_path / "run"))
    run(tmp_path / "output", look_between_pieces, recipe, count=2, environment=FSDP)
    assert {weight.dtype for weight in weights(tmp_path / "run" / "model").values()} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("sharding", "case"),
    [
        ("DDP", "stage 2"),
        pytest.param("FSDP2", "tied", marks=pytest.mark.slow),
        pytest.param("DDP", "tied", marks=pytest.mark.slow),
        pytest.param("DDP", "LoRA", marks=pytest.mark.slow),
        pytest.param("FSDP2", "stage 2", marks=pytest.mark.slow),
        pytest.param("FSDP2", "LoRA", marks=pytest.mark.slow),
    ],
)
def test_two_processes_save_the_model_of_one(mixed, tmp_path, sharding, case):
    settings, tied = mixed
    settings = settings | (CASES | MORE)[case] | ({"model": str(tied)} if case == "tied" else {})
    alone = train(Recipe(**settings, output=str(tmp_path / "one")), quiet())
    recipe = Recipe(**settings, output=str(tmp_path / "two"))
    processes = run(tmp_path / "output", train, recipe, count=2, environment=SHARDINGS[sharding])
    model = tmp_path / "two" / "model"
    assert {path.name for path in model.iterdir()} == {path.name for path in alone.model.iterdir()}
    for name in ("config.json", "adapter_config.json"):
        assert (model / name).exists() == (alone.model / name).exists()
        if (model / name).exists():
            assert (model / name).read_text() == (alone.model / name).read_text()
    one, two = weights(alone.model), weights(model)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert weight.numel()
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert "step" in processes.output(0)
    assert "step" not in processes.output(1)  # one speaks for both
    lines = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (alone.output, tmp_path / "two")
    ]
    for expected, found in zip(*lines, strict=True):
        for key in ("step", "samples", "tokens", "learning_rate"):
            assert found[key] == expected[key]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_what_one_process_finds_wrong_ends_both(mixed, tmp_path):
    settings, _ = mixed
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    rows = json.loads(Path(settings["data"][0]["file"]).read_text(encoding="utf-8"))
    rows = [*rows[:5], {"image": str(path), "conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = write(tmp_path, settings | {"data": [{"file": str(tmp_path / "data.json")}]})
    processes = start(tmp_path / "output", owl2, "train", recipe, count=2)
    assert processes.wait() == [2, 2]
    assert processes.output().count("error:") == 1
    assert "broken.png" in processes.output(0)
    assert "Traceback" not in processes.output()


def write(folder, settings):
    """A recipe's file."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"output": str(folder / "run")} | settings), encoding="utf-8")
    return str(path)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def lines_of(output):
    path = output / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("sharding", ["DDP", pytest.param("FSDP2", marks=pytest.mark.slow)])
def test_sigterm_to_one_stops_both_and_the_same_command_goes_on(mixed, tmp_path, sharding):
    settings, _ = mixed
    settings = settings | {"max_steps": 40, "learning_rate": 1e-2}
    environment = SHARDINGS[sharding]
    whole = Recipe(**settings, output=str(tmp_path / "whole"))
    run(tmp_path / "output0", train, whole, count=2, environment=environment)
    recipe = write(tmp_path, settings)
    command = ("train", recipe)
    output = tmp_path / "run"
    processes = start(tmp_path / "output1", owl2, *command, count=2, environment=environment)
    wait_for(lambda: len(lines_of(output)) > 3)
    os.kill(processes.members[1].pid, signal.SIGTERM)
    assert processes.wait() == [143, 143]
    assert "run the same command to resume" in processes.output(0)
    assert not (output / "model").exists()
    assert (output / "checkpoints" / "latest.json").exists()

    other = start(tmp_path / "output2", owl2, *command)  # one process
    assert other.wait() == [2]
    assert "is the state of 2 processes" in other.output()

    run(tmp_path / "output3", owl2, *command, count=2, environment=environment)
    one, two = weights(tmp_path / "whole" / "model"), weights(output / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


def launched(*launcher):
    """A launcher's process, which starts two of `owl2`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def accelerate(name):
    config = f"recipes/accelerate/{name}.yaml"
    port = ("--main_process_port", "0")
    return ("accelerate.commands.launch", "--config_file", config, "--num_processes", "2", *port)


LAUNCHERS = {
    "ddp.yaml": accelerate("ddp"),
    "fsdp2.yaml": accelerate("fsdp2"),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_train_stop_and_go_on(mixed, tmp_path, launcher):
    settings, _ = mixed
    settings = settings | {"save_steps": 200}
    recipe = write(tmp_path, settings)
    command = (*LAUNCHERS[launcher], "-m", "owl2", "train", recipe)
    output = tmp_path / "run"
    stopped = launched(*command, "max_steps=20000")
    wait_for(lambda: len(lines_of(output)) > 3, 120)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=120)
    assert stopped.returncode
    assert (output / "checkpoints" / "latest.json").exists(), said
    assert "run the same command to resume" in said
    step = json.loads(lines_of(output)[-1])["step"]
    # The same command but for its end, which comes at once: what was learned is not looked at.
    pointer = output / "checkpoints" / "recipe.json"
    changed = json.loads(pointer.read_text()) | {"max_steps": step + 2}
    pointer.write_text(json.dumps(changed), encoding="utf-8")
    finished = launched(*command, f"max_steps={step + 2}")
    said, _ = finished.communicate(timeout=120)
    assert finished.returncode == 0, said
    assert f"Resuming after step {step}" in said
    facts = json.loads((output / "run.json").read_text())
    assert (facts["processes"], facts["steps"]) == (2, step + 2)
    assert weights(output / "model")

    refused = launched(*command, f"max_steps={step + 2}")
    said, _ = refused.communicate(timeout=120)
    assert refused.returncode
    assert said.count("is a finished model") == 1


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_takes_the_configurations(name):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = [*accelerate(name)[1:], "-m", "owl2", "train", "recipe.yaml", "seed=1"]
    taken, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    ways = (taken.multi_gpu, taken.use_fsdp, taken.use_deepspeed)
    assert ways == tuple(name == each for each in ("ddp", "fsdp2", "deepspeed_zero3"))
    if name == "fsdp2":
        assert taken.fsdp_version == 2
    if name == "deepspeed_zero3":
        assert taken.zero_stage == 3
        assert taken.zero3_save_16bit_model
    assert (taken.num_processes, taken.mixed_precision) == (2, "no")
    assert taken.training_script_args == ["train", "recipe.yaml", "seed=1"]
