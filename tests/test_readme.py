"""What the README shows is run: its Python, its commands, its recipe."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from owl2.train.recipe_file import read_recipe
from tests.documents import blocks, commands, require_command

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
RELEASED = "MAGAer13/mplug-owl2-llama2-7b"


def test_the_python(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """As it stands, one block after the other; with a tiny model in place of the released one."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("street.jpg")
    # 512 new tokens of noise would take a while.
    code = (
        "\n".join(blocks(README, "python"))
        .replace(RELEASED, str(tiny_checkpoint))
        .replace("512", "8")
    )
    assert RELEASED in README
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_recipe(tmp_path):
    for text in blocks(README, "yaml"):
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        recipe = read_recipe(file, ["learning_rate=1e-4"])
        assert recipe.stage == 2
        assert recipe.learning_rate == 1e-4
        assert yaml.safe_load(text).keys() <= recipe.model_dump().keys()


@pytest.mark.parametrize("line", commands(README))
def test_a_command_and_its_options_exist(line):
    require_command(line)


def test_the_commands_are_found():
    assert {line.split()[1] for line in commands(README)} == {
        "chat",
        "init",
        "train",
        "data",
        "eval",
        "info",
        "plan",
        "merge",
        "bench",
    }


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@@|TODO|XXX", README)
