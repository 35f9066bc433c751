"""`~` is the home directory in options, recipes, data files and Python arguments."""

import inspect
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


# ------------------------------------------------------------------ every option and recipe key

# Every command with all of its paths, as NAME=VALUE. Names with -- are options.
COMMANDS = {
    name: dict(word.split("=", 1) for word in words.split())
    for name, words in {
        "chat": "--model=adapter --image=images/a.png --video=clip.gif --base=model "
        "--json-schema=schema.json question=what?",
        "init": "--llm=fresh --vision=fresh --config=config.yaml --chat-template=template.jinja "
        "--output=out/init",
        "info": "model=adapter --base=model --image=images/a.png",
        "plan": "recipe=recipe.yaml --statistics=statistics.json --config-from=model "
        "--output-file=out/plan.json",
        "train": "recipe=recipe.yaml",
        "merge": "adapter=adapter --output=out/merged --base=model",
        "bench": "--model=model --output=out/bench --cases=encode_8",
        "serve": "--model=adapter --base=model --api-key-file=keys --anchors=anchors --port=0",
        "web": "--model=adapter --base=model --api-key-file=keys --examples=examples.json "
        "--anchors=anchors --port=0",
        "attend": "--model=adapter --output=out/attend --image=images/a.png --base=model "
        "question=what?",
        "caption": "folder=images --model=adapter --output-file=out/captions.jsonl --base=model "
        "--json-schema=schema.json",
        "data convert": "name=llava_instruct source=images out=out/rows.jsonl",
        "data check": "source=rows.json --model=model --output=out/check",
        "data show": "source=rows.json --model=model --html=out/page.html",
        "eval": "--model=adapter --tasks=~/questions.jsonl --output=out/eval --data=images "
        "--base=model --anchors=anchors",
        "eval compare": "first=run second=run --output-file=out/compare.html",
        "quantize": "model=model output=out/quantized --method=gptq --calibration=rows.json",
        "export": "model=model output=out/exported",
        "rate": "images=images --model=adapter --output-file=out/scores.jsonl --base=model "
        "--html=out/scores.html --method=q-align --anchors=anchors",
        "eval judge": "run=run --judge-url=http://localhost:9 --judge-model=none",
    }.items()
}
TEXTS = {  # parameters of type `str` that are not paths
    *("question", "device", "dtype", "image_policy", "quantize", "settings", "gpu", "gpu_memory"),
    *("sharding", "size", "cases", "host", "served_model_name", "api_key_env", "layers", "token"),
    *(
        "answer",
        "prompt",
        "engine",
        "target",
        "name",
        "suite",
        "prompts",
        "judge_url",
        "judge_model",
        "hub",
    ),
    *("choice", "allowed_hosts", "allowed_origins", "sizes", "method", "modules_8bit", "task"),
    *("kind", "prompt_form", "lora_modules", "mam_modules"),
}


def all_commands(app, prefix=""):
    """The function of each command by its name."""
    for group in app.registered_groups:
        instance = group.typer_instance
        if instance.registered_callback and instance.info.invoke_without_command:
            yield group.name, instance.registered_callback.callback
        yield from all_commands(instance, f"{group.name} ")
    for info in app.registered_commands:
        yield prefix + (info.name or info.callback.__name__), info.callback


def test_every_path_of_every_command_is_listed():
    """A new option of type `str` is either a path or listed in `TEXTS`."""
    from owl2.cli import app

    found = {}
    for name, function in all_commands(app):
        types = {
            key: str(getattr(parameter.annotation, "__args__", [parameter.annotation])[0])
            for key, parameter in inspect.signature(function).parameters.items()
        }
        texts = {key for key, kind in types.items() if "str" in kind or "Literal" in kind}
        paths = {key for key, kind in types.items() if "Path" in kind} | (texts - TEXTS)
        if paths:
            found[name] = paths
    listed = {
        name: {key.lstrip("-").replace("-", "_") for key in words} - TEXTS - {"port"}
        for name, words in COMMANDS.items()
    }
    found["eval"].discard("tasks")  # see `test_custom_questions`
    listed["eval"].discard("tasks")
    assert found == listed


def is_path(key):
    return key.lstrip("-").replace("-", "_") not in TEXTS | {"port", "tasks"}


CASES = [
    (name, key)
    for name, words in COMMANDS.items()
    for key in filter(is_path, words)
    # The first needs two runs with scores, the second a published checkpoint.
    if (name, key) not in {("eval compare", "--output-file"), ("info", "--image")}
]


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    """An adapter of the tiny model, which names a base model that does not exist any more."""
    from owl2.model.modeling import Owl2ForConditionalGeneration
    from owl2.processing.processor import Owl2Processor
    from owl2.train.adapters import apply_lora
    from owl2.train.recipe_sections import LoraSettings

    folder = tmp_path_factory.mktemp("adapter")
    base = shutil.copytree(tiny_checkpoint, folder / "base")
    model = Owl2ForConditionalGeneration.from_pretrained(base)
    apply_lora(model, LoraSettings(r=2), seed=0)
    model.save_pretrained(folder / "adapter")
    Owl2Processor.from_pretrained(base).save_pretrained(folder / "adapter")
    shutil.rmtree(base)
    return folder / "adapter"


@pytest.fixture
def complete_home(home, tiny_checkpoint, adapter):
    """A home directory with the inputs of all commands, and the file `file`."""
    (home / "model").symlink_to(tiny_checkpoint)
    (home / "adapter").symlink_to(adapter)
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    recipe = {
        "model": "~/model",
        "output": "~/out/run",
        "stage": 2,
        "max_length": 64,
        "data": [{"file": "~/rows.json"}],
    }
    examples = [{"question": "what?", "image": "~/images/a.png"}]
    statistics = {"tokens": {"mean": 9}, "images": {"mean": 0}, "usable": 1}
    contents = {
        "file": "",
        "keys": "0123456789abcdef\n",
        "recipe.yaml": json.dumps(recipe),
        "config.yaml": "{}",
        "template.jinja": "",
        "statistics.json": json.dumps({"all": statistics}),
        "run/results.json": json.dumps({"tasks": {}}),
        "examples.json": json.dumps(examples),
        "rows.json": json.dumps([{"conversations": turns}]),
        "questions.jsonl": json.dumps({"question": "what?", "answer": "red"}),
    }
    (home / "run").mkdir()
    for name, content in contents.items():
        (home / name).write_text(content)
    return home


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_home_directory_in_every_option(complete_home, run_cli, name, parameter):
    """A path that does not exist or cannot be written is named with the home directory."""
    words = dict(COMMANDS[name])
    is_output = words[parameter].startswith("out/")
    named = "file" if is_output else "missing.jsonl"
    for key, value in words.items():
        if is_path(key) and value != "fresh":
            words[key] = f"~/{value}"
    words[parameter] = "~/file/x.jsonl" if is_output else "~/missing.jsonl"
    if parameter != "--json-schema":
        words.pop("--json-schema", None)  # a valid schema needs an optional package
    if parameter != "--video":
        words.pop("--video", None)
    if parameter == "--anchors":
        if name == "rate":
            words["--method"] = "compare2score"
    else:
        words.pop("--anchors", None)
    if parameter == "--data":
        words["--tasks"] = "vqav2"
    if name == "info":
        words.pop("--image")
        words["--device"] = "cpu"
    arguments = [
        word
        for key, value in words.items()
        for word in ([key, value] if key.startswith("--") else [value])
    ]
    flags = ["--verify"] if name == "info" else []
    result = run_cli(*name.split(), *arguments, *flags)
    assert result.exit_code == 2, result.stdout
    assert str(complete_home / named) in result.stderr


def test_every_path_of_a_recipe_is_expanded():
    """A new key with text is either a path, whose type expands `~`, or listed here."""
    from owl2.train.recipe import Recipe
    from owl2.train.recipe_file import SECTIONS

    texts = {"name", "dataset", "split", "style", "options", "wandb_project", "target_modules"}
    texts.add("level_prefix")
    paths = set()
    for section in (Recipe, *SECTIONS.values()):
        for key, field in section.model_fields.items():
            kind = f"{field.annotation} {field.metadata}".replace("abstractor", "")
            paths |= {key} if "expanduser" in kind else set()
            assert ("str" in kind) <= (key in paths | texts), key
    assert paths == {"model", "output", "file", "shards", "hf_dataset", "images"}


def test_examples_and_keys_of_a_server(complete_home):
    from owl2.serve.auth import ApiKeys
    from owl2.serve.web.examples import read_examples

    [example] = read_examples("~/examples.json")
    assert example.images == (complete_home / "images/a.png",)
    assert ApiKeys.read(None, "~/keys")
