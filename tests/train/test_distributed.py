"""Two processes on CPUs give the results of one, stop together, and save one model."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
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
from tests.train.runs import quiet, read_jsonl, wait_for, weights, write_recipe
from tests.train.tiny import COLORS, SMALL_RUN, write_rows

ROOT = Path(__file__).parents[2]
SHARDINGS = {"DDP": {}, "FSDP2": FSDP}
# A tiny learning rate, so that the weights are the same in all steps, and no clipping.
FIXED_WEIGHTS = {"learning_rate": 1e-9, "min_lr": 0.0, "max_grad_norm": 1e9, "max_steps": 3}
CASES = {
    "stage 2": {},
    "stage 1": {"stage": 1},
    "accumulated": {
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
    """Settings of a run on samples with and without images, one per process and step."""
    folder = tmp_path_factory.mktemp("mixed")
    answers = [" ".join([COLORS[n % len(COLORS)]] * (1 + n % 5)) for n in range(24)]
    write_rows(folder / "data.json", answers, lambda n: world / f"{n}.png" if n % 2 else None)
    tied = folder / "tied"
    original = Owl2ForConditionalGeneration.from_pretrained(world / "start")
    model = make_model(vocab_size=original.config.vocab_size, tie_word_embeddings=True)
    model.save_pretrained(tied)
    for path in (world / "start").iterdir():
        if not (tied / path.name).exists():
            (tied / path.name).write_bytes(path.read_bytes())
    return SMALL_RUN | {
        "model": str(world / "start"),
        "data": [{"file": str(folder / "data.json"), "images": "/"}],
        "max_steps": 5,
        "batch_size": 2,
        "seed": 12,  # the first steps have images in one process, in the other, in both
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": None,
    }, tied


def keep_gradients(folder, recipe):
    """Train; save the gradients of every step, and its numbers of images."""
    kept = []
    norm, step = Owl2Trainer._get_grad_norm, Owl2Trainer.training_step
    images = []

    def keep_norm(self, model, grad_norm=None):
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                found[name] = full.clone()
        loss = self.context.all_reduce_sum(float(self.step_loss))[0] / self.context.world_size
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
        train(recipe, quiet())
        torch.save(kept, folder / f"{context.rank} of {context.world_size}.pt")


@pytest.fixture(scope="module")
def gradients(mixed, tmp_path_factory):
    """Runs `keep_gradients` for a case in 1 process or in 2; returns the results by rank."""
    settings, tied = mixed

    @functools.cache
    def keep(sharding, case):
        folder = tmp_path_factory.mktemp("gradients")
        changes = CASES[case] | ({"model": str(tied)} if case == "tied" else {})
        recipe = Recipe(**settings | FIXED_WEIGHTS | changes | {"output": str(folder / "run")})
        count = 1 if sharding is None else 2
        environment = SHARDINGS.get(sharding)
        run(folder, keep_gradients, folder, recipe, count=count, environment=environment)
        return [torch.load(folder / f"{rank} of {count}.pt") for rank in range(count)]

    return keep


@pytest.mark.parametrize(
    ("case", "sharding"),
    [
        case
        if case in (("stage 1", "DDP"), ("stage 2", "FSDP2"))
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(CASES, SHARDINGS)
    ],
)
def test_two_processes_give_the_losses_and_gradients_of_one(gradients, case, sharding):
    [one], two = gradients(None, case), gradients(sharding, case)
    if CASES[case].get("batch_size") is None:
        # A process with images and one without, in both orders, could deadlock.
        shares = [tuple(bool(sum(s["images"])) for s in step) for step in zip(*two, strict=True)]
        assert shares == [(False, True), (True, False), (True, True)]
    for expected, found in zip(one, two[0], strict=True):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["norm"], expected["norm"], rtol=1e-5, atol=1e-6)
        assert expected["gradients"].keys() <= found["gradients"].keys()
        for name, gradient in found["gradients"].items():
            single = expected["gradients"].get(name)
            if single is None:  # a step without images has no gradient for it
                assert not gradient.any(), name
            else:
                torch.testing.assert_close(gradient, single, rtol=1e-5, atol=1e-6, msg=name)


def check_between_micro_batches(recipe):
    """Train; losses and reduced gradients are float32, and each process keeps its shard."""
    step = Owl2Trainer.training_step

    def checked_step(self, model, *args, **kwargs):
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
            assert gradient is not None, f"{name} has no gradient shard"
            assert gradient.to_local().dtype == torch.float32
            assert gradient.to_local().shape == parameter.to_local().shape
        return loss

    Owl2Trainer.training_step = checked_step
    train(recipe, quiet())


@pytest.mark.slow
def test_fsdp2_in_bfloat16_reduces_in_float32_and_keeps_shards(mixed, tmp_path):
    settings, _ = mixed
    accumulated = {
        "dtype": "bfloat16",
        "gradient_accumulation_steps": 2,
        "batch_size": 4,
        "max_steps": 2,
    }
    validation = {"validation": {"data": settings["data"], "max_samples": 3, "num_generations": 1}}
    recipe = Recipe(**settings | accumulated | validation, output=str(tmp_path / "run"))
    run(tmp_path / "output", check_between_micro_batches, recipe, count=2, environment=FSDP)
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
    settings = settings | CASES[case] | ({"model": str(tied)} if case == "tied" else {})
    single = train(Recipe(**settings, output=str(tmp_path / "one")), quiet())
    recipe = Recipe(**settings, output=str(tmp_path / "two"))
    processes = run(tmp_path / "output", train, recipe, count=2, environment=SHARDINGS[sharding])
    model = tmp_path / "two" / "model"
    assert {path.name for path in model.iterdir()} == {path.name for path in single.model.iterdir()}
    for name in ("config.json", "adapter_config.json"):
        assert (model / name).exists() == (single.model / name).exists()
        if (model / name).exists():
            assert (model / name).read_text() == (single.model / name).read_text()
    one, two = weights(single.model), weights(model)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert weight.numel()
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert "step" in processes.output(0)
    assert "step" not in processes.output(1)  # only the main process prints
    lines = [read_jsonl(run / "log.jsonl") for run in (single.output, tmp_path / "two")]
    for expected, found in zip(*lines, strict=True):
        for key in ("step", "samples", "tokens", "learning_rate"):
            assert found[key] == expected[key]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_error_of_one_process_ends_both(mixed, tmp_path):
    settings, _ = mixed
    path = tmp_path / "broken.png"
    path.write_bytes(b"not an image")
    turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    rows = json.loads(Path(settings["data"][0]["file"]).read_text(encoding="utf-8"))
    rows = [*rows[:5], {"image": str(path), "conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = write_recipe(tmp_path, settings | {"data": [{"file": str(tmp_path / "data.json")}]})
    processes = start(tmp_path / "output", owl2, "train", recipe, count=2)
    assert processes.wait() == [2, 2]
    assert processes.output().count("error:") == 1
    assert "broken.png" in processes.output(0)
    assert "Traceback" not in processes.output()


@pytest.mark.slow
def test_stage_1_without_images_ends_both_processes(mixed, tmp_path):
    settings, _ = mixed
    write_rows(tmp_path / "data.json", COLORS, lambda _: None)
    changes = {"stage": 1, "max_steps": 2, "data": [{"file": str(tmp_path / "data.json")}]}
    recipe = write_recipe(tmp_path, settings | changes)
    processes = start(tmp_path / "output", owl2, "train", recipe, count=2)
    assert processes.wait() == [2, 2]
    assert "4 samples" in processes.output(0)
    assert "Traceback" not in processes.output()


@pytest.mark.parametrize("sharding", ["DDP", pytest.param("FSDP2", marks=pytest.mark.slow)])
def test_sigterm_to_one_process_stops_both_and_the_run_is_resumed(mixed, tmp_path, sharding):
    settings, _ = mixed
    settings = settings | {"max_steps": 30, "learning_rate": 1e-2}
    environment = SHARDINGS[sharding]
    uninterrupted = Recipe(**settings, output=str(tmp_path / "uninterrupted"))
    run(tmp_path / "output0", train, uninterrupted, count=2, environment=environment)
    recipe = write_recipe(tmp_path, settings)
    command = ("train", recipe)
    output = tmp_path / "run"
    processes = start(tmp_path / "output1", owl2, *command, count=2, environment=environment)
    wait_for(lambda: len(read_jsonl(output / "log.jsonl")) > 3)
    os.kill(processes.members[1].pid, signal.SIGTERM)
    assert processes.wait() == [143, 143]
    assert "run the same command to resume" in processes.output(0)
    assert not (output / "model").exists()
    assert (output / "checkpoints" / "latest.json").exists()

    other = start(tmp_path / "output2", owl2, *command)  # one process
    assert other.wait() == [2]
    assert "2 processes" in other.output()

    run(tmp_path / "output3", owl2, *command, count=2, environment=environment)
    one, two = weights(tmp_path / "uninterrupted" / "model"), weights(output / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


def launched(*launcher):
    """Start a launcher, which starts two processes of `owl2`."""
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
def test_launchers_train_stop_and_resume(mixed, tmp_path, launcher):
    settings, _ = mixed
    settings = settings | {"save_steps": 200}
    recipe = write_recipe(tmp_path, settings)
    command = (*LAUNCHERS[launcher], "-m", "owl2", "train", recipe)
    output = tmp_path / "run"
    stopped = launched(*command, "max_steps=20000")
    wait_for(lambda: len(read_jsonl(output / "log.jsonl")) > 3, seconds=120)
    stopped.send_signal(signal.SIGTERM)
    text, _ = stopped.communicate(timeout=120)
    assert stopped.returncode
    assert (output / "checkpoints" / "latest.json").exists(), text
    assert "run the same command to resume" in text
    step = read_jsonl(output / "log.jsonl")[-1]["step"]
    # The same command, with an earlier end: the weights are not compared here.
    identity = output / "checkpoints" / "recipe.json"
    changed = json.loads(identity.read_text()) | {"max_steps": step + 2}
    identity.write_text(json.dumps(changed), encoding="utf-8")
    finished = launched(*command, f"max_steps={step + 2}")
    text, _ = finished.communicate(timeout=120)
    assert finished.returncode == 0, text
    assert f"Resuming after step {step}" in text
    results = json.loads((output / "run.json").read_text())
    assert (results["processes"], results["steps"]) == (2, step + 2)
    assert weights(output / "model")

    refused = launched(*command, f"max_steps={step + 2}")
    text, _ = refused.communicate(timeout=120)
    assert refused.returncode
    assert text.count("is a finished model") == 1


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_accepts_the_configurations(name):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = [*accelerate(name)[1:], "-m", "owl2", "train", "recipe.yaml", "seed=1"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    ways = (parsed.multi_gpu, parsed.use_fsdp, parsed.use_deepspeed)
    assert ways == tuple(name == each for each in ("ddp", "fsdp2", "deepspeed_zero3"))
    if name == "fsdp2":
        assert parsed.fsdp_version == 2
    if name == "deepspeed_zero3":
        assert parsed.zero_stage == 3
        assert parsed.zero3_save_16bit_model
    assert (parsed.num_processes, parsed.mixed_precision) == (2, "no")
    assert parsed.training_script_args == ["train", "recipe.yaml", "seed=1"]
