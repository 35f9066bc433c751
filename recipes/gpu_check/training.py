"""Shared by the steps that train: data, and a comparison of losses with one process."""

import json
import sys

from step import ROOT, Step

RECIPE = "recipes/finetune/full.yaml"
LOSS_ERROR = 1e-3  # relative


def data_files(step: Step) -> list[str]:
    """Settings of a recipe for a small dataset; written on first use."""
    folder = step.folder / "data"
    if not (folder / "train.json").exists():
        step.run(sys.executable, ROOT / "recipes" / "finetune" / "example_folder.py", folder)
    return [f"data.0.file={folder}/train.json", f"data.0.images={folder}"]


def compare_losses(step: Step, configuration: str) -> None:
    """Train a small model with a configuration of accelerate; the losses equal those without it.

    Args:
        configuration: The name of a file in recipes/accelerate/, without its ending.
    """
    start = step.folder / "start"
    if not start.exists():
        sizes = "recipes/easy_vqa/sizes.yaml"
        step.owl2(
            *("init", "--llm", "fresh", "--vision", "fresh", "--config", sizes),
            *("--output", start),
        )
    settings = [
        f"model={start}",
        *data_files(step),
        *("image_size=null", "max_length=96", "batch_size=4", "gradient_accumulation_steps=1"),
        *("max_steps=4", "warmup_steps=1", "save_steps=null", "logging_steps=1"),
        *("dtype=float32", "dataloader_num_workers=0"),
    ]
    losses = {}
    launch = ["accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]
    launch += ["--config_file", f"recipes/accelerate/{configuration}.yaml", "-m"]
    for name, launcher in (("plain", []), (configuration, launch)):
        output = step.folder / f"run-{name}"
        if not (output / "run.json").exists():
            command = [*launcher, "owl2", "train", RECIPE, *settings, f"output={output}"]
            step.run(sys.executable, "-m", *command)
        lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    step.values["losses"] = losses
    plain, sharded = losses.values()
    step.check("steps with a loss", len(sharded), least=4)
    for number, (one, other) in enumerate(zip(plain, sharded, strict=True), 1):
        step.check(
            f"loss of step {number}, relative error", abs(one - other) / one, most=LOSS_ERROR
        )
