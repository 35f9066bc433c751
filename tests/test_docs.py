"""The how-tos in docs/ tell the truth: commands, options, recipes, links and files exist.

What stands in their `sh` blocks is run, page by page, by `make docs` (tests/run_docs.py).
"""

import re
from pathlib import Path

import pytest

from owl2.train.recipe_file import read_recipe
from tests.documents import blocks, commands, require_command

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md")
# What a page's parts of recipes are laid over.
LEAST = "{stage: 2, model: m, output: o, data: [{dataset: easy_vqa}]}"
ON = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_the_how_tos_are_there():
    assert {"finetune", "pretrain", "data", "distributed"} <= {page.stem for page in PAGES}


@ON
def test_commands_and_their_options_exist(page):
    lines = commands(page.read_text(encoding="utf-8"), ("", "sh"))
    assert lines
    for line in lines:
        require_command(line)


@ON
def test_recipes_and_parts_of_recipes_can_be_read(page, tmp_path):
    (tmp_path / "least.yaml").write_text(LEAST, encoding="utf-8")
    for number, text in enumerate(blocks(page.read_text(encoding="utf-8"), "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text if "base:" in text else f"base: least.yaml\n{text}", encoding="utf-8")
        read_recipe(file)


@ON
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link
    for path in re.findall(r"\brecipes/[\w./-]+\.(?:yaml|py|sh)\b", text):
        assert (ROOT / path).exists(), path
