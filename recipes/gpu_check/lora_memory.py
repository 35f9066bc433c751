"""LoRA at the released size: two training steps, and the memory that `owl2 plan` estimates."""

import json

from step import Step, main
from training import data_files

MEMORY_ERROR = 0.15  # of the estimate, relative to the measured peak


def check(step: Step) -> None:
    """The estimate is within 15 % of the measured memory."""
    checkpoint = step.checkpoint("tiny" if step.dry else "7b")
    output, plan = step.folder / "lora", step.folder / "plan.json"
    settings = [
        f"model={checkpoint}",
        f"output={output}",
        *data_files(step),
        *("image_size=null", "max_length=256", "batch_size=1", "gradient_accumulation_steps=1"),
        *("max_steps=2", "warmup_steps=0", "save_steps=null", "logging_steps=1"),
        "dataloader_num_workers=0",
    ]
    recipe = "recipes/finetune/lora.yaml"
    gpus = "0" if step.dry else "1"
    step.owl2("plan", recipe, *settings, "--gpus", gpus, "--output-file", plan)
    step.owl2("train", recipe, *settings)
    step.values["plan"] = json.loads(plan.read_text())
    run = json.loads((output / "run.json").read_text())
    step.values["run"] = run
    if not step.dry:
        estimate = step.values["plan"]["total"]
        measured = run["peak_memory_bytes"]["gpu"]
        step.check(
            "estimated over measured memory",
            estimate / measured,
            least=1 - MEMORY_ERROR,
            most=1 + MEMORY_ERROR,
        )


if __name__ == "__main__":
    main(check)
