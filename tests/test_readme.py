"""The README's code and commands work, and the Chinese README agrees with the English one."""

import re
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image

from owl2.cli import app
from owl2.train.recipe_file import read_recipe
from tests.documents import FENCE, blocks, commands, prose, require_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
RELEASED = "MAGAer13/mplug-owl2-llama2-7b"


def test_python_example_runs(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """With a tiny checkpoint. tests/serve/test_readme.py runs the example of the OpenAI client."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("street.jpg")
    [code] = [block for block in blocks(README, "python") if "import OpenAI" not in block]
    assert RELEASED in code and "=512" in code
    code = code.replace(RELEASED, str(tiny_checkpoint)).replace("=512", "=8")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_recipe_is_valid(tmp_path):
    [text] = blocks(README, "yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    recipe = read_recipe(file, ["learning_rate=1e-4"])
    assert recipe.stage == 2
    assert recipe.learning_rate == 1e-4
    assert yaml.safe_load(text).keys() <= recipe.model_dump().keys()


@pytest.mark.parametrize("line", commands(README))
def test_command_and_options_exist(line):
    require_command(line)


def test_table_lists_every_command():
    listed = set(re.findall(r"^\| `owl2 (\w+)` \|", README, re.MULTILINE))
    assert listed == typer.main.get_command(app).commands.keys() - {"version"}


def test_demo_output_has_the_headings_of_the_demo():
    script = (ROOT / "recipes/easy_vqa/demo.sh").read_text(encoding="utf-8")
    headings = re.findall(r'^heading "(\d/\d .*)"$', script, re.MULTILINE)
    [output] = blocks(README, "text")
    assert headings == re.findall(r"^\d/\d .*$", output, re.MULTILINE)


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_lines_are_at_most_120_characters(text):
    assert not [line for line in text.splitlines() if len(line) > 120]


# ------------------------------------------------------------------ Chinese


def blocks_without_comments(text):
    """All fenced blocks with their languages. Comments are translated, so they are removed."""
    return [
        (language, re.sub(r" +#.*|^# .*", "", content, flags=re.MULTILINE))
        for language, content in FENCE.findall(text)
    ]


def test_chinese_readme_has_the_same_code_and_output():
    assert len(blocks_without_comments(README)) > 5
    assert blocks_without_comments(CHINESE) == blocks_without_comments(README)


def test_chinese_readme_has_the_same_outline():
    def outline(text):
        return re.findall(r"^(#+) |^(\|)|^(!)\[|^(- )", prose(text), re.MULTILINE)

    assert outline(CHINESE) == outline(README)


def test_chinese_readme_has_the_same_links_and_figures():
    def links(text):
        found = re.findall(r"\]\(([^)]+)\)", prose(text))
        return sorted(set(found) - {"README.md", "README.zh-CN.md"})

    def figures(text):
        # Numbers with at least two digits. Smaller ones can be words.
        return set(re.findall(r"\d[\d,.]*\d", re.sub(r"\]\([^)]+\)", "", prose(text))))

    assert links(CHINESE) == links(README)
    assert figures(CHINESE) == figures(README)
    assert "(README.md)" in CHINESE and "(README.zh-CN.md)" in README


def test_chinese_readme_has_full_width_punctuation():
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose(CHINESE))
    assert not re.findall(r"[\u4e00-\u9fff][,:;()]|[,:;()][\u4e00-\u9fff]", text)
