"""`~` is the home directory in options, recipes, data files and Python arguments."""

import json
import shutil

import pytest
from PIL import Image

from owl2.data.json_dataset import JsonDataset
from owl2.data.open_dataset import open_from_cli
from owl2.eval.tasks import find_tasks
from owl2.processing.image_io import load_image
from owl2.processing.messages import parse_messages
from owl2.train.recipe_file import read_recipe


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(home / "images/a.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def test_paths_of_commands(home, run_cli):
    for arguments in (["eval", "compare", "~/first", "~/second"], ["plan", "~/first"]):
        result = run_cli(*arguments)
        assert result.exit_code == 2
        assert str(home / "first") in result.stderr


def test_recipes(home):
    (home / "base.yaml").write_text("stage: 2\nmax_steps: 300\n")
    data = [
        {"file": "~/a.jsonl", "images": "~/images"},
        {"shards": "~/{0..1}.tar"},
        {"shards": ["~/2.tar", "http://host/~/3.tar"]},
        {"hf_dataset": "~/rows"},
    ]
    recipe = {"base": "~/base.yaml", "model": "~/m", "output": "~/out", "data": data}
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    read = read_recipe("~/recipe.yaml", ["validation={data: [{file: ~/held.jsonl}]}"])
    assert (read.model, read.output) == (f"{home}/m", f"{home}/out")
    file, shards, shard_list, rows = read.data
    assert (file.file, file.images) == (f"{home}/a.jsonl", f"{home}/images")
    assert shards.shards == f"{home}/{{0..1}}.tar"
    assert shard_list.shards == [f"{home}/2.tar", "http://host/~/3.tar"]
    assert rows.hf_dataset == f"{home}/rows"
    assert read.validation.data[0].file == f"{home}/held.jsonl"


@pytest.mark.parametrize("image", ["a.png", "~/images/a.png"])
def test_data_files(home, image):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    (home / "rows.json").write_text(json.dumps([{"image": image, "conversations": turns}]))
    for rows in (
        JsonDataset("~/rows.json", "~/images"),
        open_from_cli("~/rows.json", ["images=~/images"]),
    ):
        [path] = parse_messages(rows[0].messages).images
        assert str(path) == str(home / "images/a.png")


def test_images(home):
    assert load_image("~/images/a.png").getpixel((0, 0)) == (255, 0, 0)


def test_custom_questions(home):
    question = {"image": "~/images/a.png", "question": "what?", "answer": "red"}
    (home / "q.jsonl").write_text(json.dumps(question))
    [task] = find_tasks("~/q.jsonl")
    [sample], _ = task.read(task.data(None))
    assert str(home / "images/a.png") in str(sample.messages)


def test_checkpoints(home, tiny_checkpoint, run_cli):
    from owl2.engine.load_model import ModelArgs

    shutil.copytree(tiny_checkpoint, home / "model")
    args = ModelArgs("~/model", device="cpu", dtype="float32")
    assert args.load_processor()
    assert args.load_model().provenance.name == str(home / "model")
    assert run_cli("info", "~/model").exit_code == 0
    assert run_cli("info", "~/other").exit_code == 2
