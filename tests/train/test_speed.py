"""The speed of packing and of data loading at the size of the demo; prints the figures.

    OMP_NUM_THREADS=1 python -m pytest -m slow -s tests/train/test_speed.py

Runs of the same recipe are compared in turn, so that other load slows both down.
"""

import importlib
import inspect
import json
import pkgutil
import time
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from owl2.data.datasets import load_dataset
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from owl2.train.recipe import Recipe
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.tiny import make_model
from tests.train.runs import quiet, read_jsonl
from tests.train.tiny import SMALL_RUN

pytestmark = pytest.mark.slow

TEXTS = 3000
PACKAGES = ("asyncio", "collections", "concurrent", "email", "html", "http", "json", "logging")
PACKAGES += ("multiprocessing", "unittest", "urllib", "xml", "importlib", "sqlite3", "tkinter")


def documentation():
    """The docstrings of Python's standard library: texts of different lengths."""
    names = [
        f"{package}.{module.name}"
        for package in PACKAGES
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
        if not module.name.startswith("_")
    ]
    found = {}
    for name in [*PACKAGES, *names]:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not on this platform
            continue
        for owner in [module, *(thing for _, thing in inspect.getmembers(module, inspect.isclass))]:
            for title, thing in inspect.getmembers(owner):
                text = inspect.getdoc(thing) if callable(thing) else None
                if text:
                    found[f"{name}.{title}"] = text
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The demo's model, untrained, and a recipe's `data`: easy-VQA and documentation."""
    folder = tmp_path_factory.mktemp("speed")
    texts = documentation()
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"What does {name} do?"},
                {"from": "gpt", "value": text},
            ]
        }
        for name, text in Random(0).sample(list(texts.items()), min(TEXTS, len(texts)))
    ]
    (folder / "text.json").write_text(json.dumps(rows), encoding="utf-8")
    words = [row["conversations"][1]["value"] for row in rows[:1000]]
    words += [str(sample.messages) for sample in load_dataset("easy_vqa", style="joined")[:300]]
    train_tokenizer(words, folder / "tokenizer.model", 1000)
    tokenizer = Owl2Tokenizer(str(folder / "tokenizer.model"))
    model = make_model(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        vision={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": 32,
        },
        abstractor={
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 176,
            "num_learnable_queries": 8,
        },
    )
    model.save_pretrained(folder)
    Owl2Processor(Owl2ImageProcessor(32), tokenizer, num_image_tokens=9).save_pretrained(folder)
    data = [
        {"dataset": "easy_vqa", "style": "joined", "options": {"most": 3}, "count": 3000},
        {"file": str(folder / "text.json")},
    ]
    return str(folder), data


def run(mixture, output: Path, **settings):
    model, data = mixture
    recipe = {
        "model": model,
        "output": str(output),
        "data": data,
        "max_length": 512,
        "max_steps": 12,
        "batch_size": 32,
        "warmup_steps": 5,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    result = train(Recipe(**SMALL_RUN | recipe | settings), quiet())
    assert result.finished
    return read_jsonl(result.output / "log.jsonl")


@pytest.fixture
def clock(monkeypatch):
    """The total tokens and the CPU seconds at the start of each step."""
    seen = []
    take = Owl2Trainer.get_batch_samples

    def taking(self, *args, **kwargs):
        seen.append((self.train_loader.counts.tokens, time.process_time()))
        return take(self, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "get_batch_samples", taking)
    return seen


def test_packing_processes_more_tokens_per_second(mixture, tmp_path, clock):
    """At least 1.5 times as many as padding, on conversations and texts of mixed length.

    In CPU seconds, because other tests may run at the same time.
    """
    layouts = {"padded": {}, "grouped": {"group_by_length": True}, "packed": {"packing": True}}
    speeds = {name: [] for name in layouts}
    for turn in range(2):
        for name, settings in layouts.items():
            clock.clear()
            run(mixture, tmp_path / f"{name}{turn}", **settings)
            (tokens, start), (last_tokens, end) = clock[2], clock[-1]  # the first steps warm up
            speeds[name].append((last_tokens - tokens) / (end - start))
    best = {name: max(found) for name, found in speeds.items()}
    for name, found in speeds.items():
        print(f"{name:8} {best[name] / best['padded']:5.2f}x  tokens/s {[round(s) for s in found]}")
    assert best["packed"] >= 1.5 * best["padded"]


def test_two_workers_load_fast_enough(mixture, tmp_path):
    """The run waits for data less than 5 % of the time."""
    lines = run(mixture, tmp_path / "run", dataloader_num_workers=2, packing=True, max_steps=25)
    lines = lines[2:]  # the workers start
    share = sum(line["data_wait_fraction"] for line in lines) / len(lines)
    print(f"data wait: {share:.1%} of the time")
    assert share < 0.05


@pytest.mark.parametrize("size", [224, 448])
def test_images_per_second_and_core(tmp_path, size):
    """JPEG images of 640 x 480 pixels, decoded and resized."""
    torch.manual_seed(0)
    paths = []
    for number in range(40):
        noise = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(
            paths[-1], quality=90
        )
    processor = Owl2ImageProcessor(size)
    processor([str(paths[0])])
    began = time.process_time()
    for path in paths:
        processor([str(path)])
    speed = len(paths) / (time.process_time() - began)
    print(f"{size} pixels: {speed:.0f} images/s per core")
    assert speed > 20
