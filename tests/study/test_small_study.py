"""The reduced study of `make study`, with drawings of shapes instead of the downloaded packages."""

import json
import time
from pathlib import Path
from random import Random

import pytest
import yaml
from cells import Runner
from figures import draw_figures
from PIL import Image, ImageDraw
from report import report
from rich.console import Console
from run import pending_cells, run_cells
from study import read_study
from tables import main_disagreements

from tests.study.conftest import RECIPES

COLORS = ("red", "green", "blue", "yellow")
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 112,
    "patch_size": 14,
}


def draw(path, color, shape):
    image = Image.new("RGB", (112, 112), "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((20, 20, 90, 90), fill=color)
    image.save(path)


def conversation(image, question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if image is None:
        return {"conversations": turns}
    turns[0]["value"] = f"<image>\n{question}"
    return {"image": image, "conversations": turns}


@pytest.fixture
def data(tmp_path):
    """A directory in the format of `recipes/study/data.py`."""
    folder, rng = tmp_path / "data", Random(0)
    folder.mkdir()
    captions, questions, exact, choices, probe = [], [], [], [], []
    for color in COLORS:
        for shape in ("circle", "square"):
            name = f"{color}_{shape}.png"
            draw(folder / name, color, shape)
            captions.append(conversation(name, "Describe the image.", f"a {color} {shape}"))
            questions.append(conversation(name, "what color is it?", color))
            labels = {"id": f"{color} {shape}", "category": "color"}
            question = {"question": "what color is it?", "answers": [color]}
            exact.append({"image": name, **labels, **question})
            options = {"options": list(COLORS), "metric": "likelihood"}
            choices.append({**exact[-1], **options})
            asked = rng.choice([color, *COLORS])
            answer = "yes" if asked == color else "no"
            question = f"is there a {asked} {shape}?"
            probe.append(
                {"image": name, "question": question, "answers": [answer], "metric": "yes_no"}
            )
    text = [conversation(None, "what is a circle?", "A circle is a round shape.")]
    exam = {"question": "what is round?", "options": ["a circle", "a box"], "answers": ["a circle"]}
    files = {
        "captions.json": captions,
        "questions.json": questions,
        "text.json": text,
        "test_exact.jsonl": exact,
        "test_choices.jsonl": choices,
        "test_probe.jsonl": probe,
        "documents.jsonl": [{"text": "Debian is a free operating system. " * 8}],
        "hamexam.jsonl": [exam | {"metric": "likelihood"}],
    }
    for name, rows in files.items():
        lines = [json.dumps(row) for row in rows]
        is_lines = name.endswith("l")
        (folder / name).write_text("\n".join(lines) if is_lines else f"[{','.join(lines)}]")
    (folder / "data.json").write_text(json.dumps({"files": sorted(files)}))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_reduced_study(data, tmp_path):
    sizes = yaml.safe_load((RECIPES / "sizes.yaml").read_text()) | {"vision": VISION}
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(sizes))
    small = yaml.safe_load((RECIPES / "small.yaml").read_text())
    small["base"] = str(RECIPES / small["base"])
    small |= {"output": str(tmp_path / "out"), "results": str(tmp_path / "results.json")}
    small["start"] |= {"vision": "fresh", "config": str(tmp_path / "sizes.yaml")}
    small["measures"] = {"data": str(data), "limit": 8}
    small["where"] = 4
    images = {"images": str(data)}
    small["shared"][0]["settings"] |= {
        "data": [
            {"file": str(data / "captions.json"), **images, "weight": 3},
            {"file": str(data / "text.json"), "weight": 1},
        ],
        "freeze": [],  # the encoder is not pre-trained
        "max_steps": 120,
    }
    small["stages"][0]["settings"] |= {
        "data": [
            {"file": str(data / "questions.json"), **images, "weight": 3},
            {"file": str(data / "text.json"), "weight": 1},
        ],
        "max_steps": 60,
    }
    for key in ("data.0.file", "data.0.images", "data.1.file"):
        del small["stages"][0]["settings"][key]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small, sort_keys=False))
    runner = Runner(read_study(path), Console(quiet=True))
    began = time.monotonic()
    assert run_cells(runner, pending_cells(runner), None) == 4
    assert time.monotonic() - began < 1200
    results = json.loads(Path(small["results"]).read_text())
    for cell in results["cells"]:
        assert cell["metrics"]["choice"] > 0.5  # chance is a quarter
        assert cell["metrics"]["choice"] > cell["metrics"]["choice_no_image"]
        assert cell["metrics"]["kl"] > 0
        assert cell["metrics"]["perplexity"] > 1
        is_full = cell["arm"] == "full"
        assert is_full == ("replaced" in cell) == ("distance" in cell["where"])
        if is_full:
            assert min(cell["where"]["distance"]["k_proj"]) > 0
    names = draw_figures(results, tmp_path)
    assert names == ["differences.svg", "attention.svg", "distances.svg"]
    assert "4 of 4 runs" in report(results, names)
    full_study = json.loads((RECIPES.parents[1] / "docs/study/results.json").read_text())
    assert main_disagreements(results, full_study) == []
