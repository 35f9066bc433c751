"""What the README shows is run: its Python, its commands, its recipe."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from owl2.train.recipe_file import read_recipe
from tests.documents import blocks, commands, require_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
RELEASED = "MAGAer13/mplug-owl2-llama2-7b"


def test_the_python(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """As it stands, one block after the other; with a tiny model in place of the released one."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("street.jpg")
    # 512 new tokens of noise would take a while.
    # What talks to a server is run in tests/serve/test_readme.py.
    own = [block for block in blocks(README, "python") if "import OpenAI" not in block]
    code = "\n".join(own).replace(RELEASED, str(tiny_checkpoint)).replace("512", "8")
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
        "serve",
        "attend",
        "caption",
    }


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@@|TODO|XXX", README)


# ------------------------------------------------------------------ in Chinese


def shown(text):
    """All fenced blocks with their languages, without comments, which are translated."""
    fenced = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r" +#.*|^# .*", "", block, flags=re.MULTILINE) for block in fenced]


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_the_chinese_readme_shows_the_same_commands_code_and_output():
    assert shown(CHINESE) == shown(README)
    assert len(shown(README)) > 8


def test_the_chinese_readme_has_the_same_parts():
    def outline(text):
        return re.findall(r"^(#+) |^(\|)|^(!)\[", prose(text), re.MULTILINE)

    assert outline(CHINESE) == outline(README)


def test_the_chinese_readme_has_the_same_links_and_figures():
    def links(text):
        found = re.findall(r"\]\(([^)]+)\)", prose(text))
        return sorted(set(found) - {"README.md", "README.zh-CN.md"})

    def figures(text):
        # Words for small numbers differ by language; digits do not.
        return set(re.findall(r"\d[\d,.]*\d", re.sub(r"\]\([^)]+\)", "", prose(text))))

    assert links(CHINESE) == links(README)
    assert figures(CHINESE) == figures(README)
    assert "README.md" in CHINESE and "README.zh-CN.md" in README


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_what_is_linked_is_there(text):
    for target in re.findall(r"\]\(([^)#]+)\)", prose(text)):
        assert target.startswith("https://") or (ROOT / target).exists(), target
