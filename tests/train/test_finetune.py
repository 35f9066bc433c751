"""Fine-tuning the demo's model on a folder of images improves its answers on held-out images."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from owl2.engine.engine import Engine
from owl2.train.recipe import Recipe
from owl2.train.run import train
from tests.train.runs import quiet, read_jsonl

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # the demo may have to run first


@pytest.fixture(scope="module")
def demo():
    """The demo's model; trained if it does not exist."""
    model = ROOT / "runs" / "demo" / "model"
    if not model.is_dir():
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        script = ["bash", str(ROOT / "recipes" / "easy_vqa" / "demo.sh")]
        subprocess.run(script, check=True, env=os.environ | {"PATH": path})
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of small and large shapes with questions."""
    folder = tmp_path_factory.mktemp("images")
    script = runpy.run_path(str(ROOT / "recipes" / "finetune" / "example_folder.py"))
    script["main"](folder)
    return folder


def accuracy(model, folder):
    rows = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    questions = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": str(folder / row["image"])},
                    {"type": "text", "text": row["conversations"][0]["value"].split("<image>")[1]},
                ],
            }
        ]
        for row in rows
    ]
    answers = Engine.from_pretrained(model).batch(questions)
    references = [row["conversations"][1]["value"] for row in rows]
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(rows)


@pytest.mark.parametrize(
    "how",
    [
        {"learning_rate": 5e-4},
        {"learning_rate": 2e-3, "lora": {"modules_to_save": ["abstractor", "vision"]}},
        {"learning_rate": 3e-3, "lora": {"parts": ["decoder", "abstractor", "vision"]}},
    ],
    ids=["full", "LoRA and vision", "LoRA only"],
)
def test_finetuning_improves_held_out_answers(demo, folder, tmp_path, how):
    recipe = Recipe(
        **{
            "stage": 2,
            "model": str(demo),
            "output": str(tmp_path / "run"),
            "data": [{"file": str(folder / "train.json")}],
            "image_size": None,
            "max_length": 256,
            "epochs": 8.0,
            "batch_size": 16,
            "min_lr": 1e-5,
            "warmup_steps": 10,
            "gradient_checkpointing": False,
            "dataloader_num_workers": 0,
            "dtype": "float32",
            "validation": {"data": [{"file": str(folder / "held_out.json")}], "eval_steps": 100},
        }
        | how
    )
    result = train(recipe, quiet())
    losses = [line["loss"] for line in read_jsonl(result.output / "validation.jsonl")]
    assert losses[-1] < 0.05 * losses[0]
    assert accuracy(demo, folder) < 0.1  # it was not trained on sizes
    assert accuracy(result.model, folder) > 0.95
