"""A full disk: a limit on the size of files, beyond which every write of this process fails."""

import json
import resource
import shutil
from contextlib import contextmanager

import pytest
from PIL import Image

KIB = 1024
# Arguments, the path in the message, and the largest possible file. {out} does not exist.
COMMANDS = {
    "caption": ("caption {images} --model {model} --output-file {out}/a.jsonl", "a", 0),
    "eval responses": ("eval --model {model} --tasks {questions} --output {out}", "responses", 0),
    "eval report": ("eval --model {model} --tasks {questions} --output {out}", "", KIB),
    "data check": ("data check {rows} --model {model} --output {out} --workers 1", "", 0),
    "data show": ("data show {rows} --model {model} --html {out}/a.html", "a.html", 0),
    "data convert": ("data convert llava_instruct {source} {out}/a.jsonl", "a.jsonl", 0),
    "merge": ("merge {adapter} --output {out}", "", 16 * KIB),
    "merge without space for the configuration": ("merge {adapter} --output {out}", "", 0),
}


@contextmanager
def full_disk(limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def files(tiny_checkpoint, tmp_path_factory):
    from owl2.model.modeling import Owl2ForConditionalGeneration
    from owl2.processing.processor import Owl2Processor
    from owl2.train.adapters import apply_lora
    from owl2.train.recipe_sections import LoraSettings

    folder = tmp_path_factory.mktemp("files")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "images/a.png")
    model = Owl2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    apply_lora(model, LoraSettings(r=2), seed=0)
    model.save_pretrained(folder / "adapter")
    Owl2Processor.from_pretrained(tiny_checkpoint).save_pretrained(folder / "adapter")
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    (folder / "source").mkdir()
    asked = [{"from": "human", "value": "<image>\nwhat?"}, turns[1]]
    row = {"id": "1", "image": "1.jpg", "conversations": asked}
    for name, content in {
        "questions.jsonl": {"question": "what?", "answer": "red"},
        "rows.json": [{"conversations": turns}],
        "source/llava_instruct_150k.json": [row],
    }.items():
        (folder / name).write_text(json.dumps(content))
    names = ("images", "adapter", "source", "questions.jsonl", "rows.json")
    return {name.split(".")[0]: str(folder / name) for name in names} | {
        "model": str(tiny_checkpoint)
    }


@pytest.mark.parametrize(("arguments", "named", "limit"), COMMANDS.values(), ids=COMMANDS)
def test_full_disk(run_cli, files, tmp_path, arguments, named, limit):
    words = arguments.format(**files, out=tmp_path / "out").split()
    with full_disk(limit):
        result = run_cli(*words)
    assert result.exit_code == 2, result
    assert str(tmp_path / "out" / named) in result.stderr
    assert "File too large" in result.stderr
    # Unfinished files have a hidden name or `.part-`, and a later run removes or resumes them.
    finished = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(".part-" in path.name or path.stat().st_size <= limit for path in finished)
    result = run_cli(*words)
    assert result.exit_code == 0, result.stderr
    shutil.rmtree(tmp_path / "out")
