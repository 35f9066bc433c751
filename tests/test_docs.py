"""The pages of docs/ and CONTRIBUTING.md: their commands, recipes, files, and functions exist.

`make docs` (tests/run_docs.py) runs the `sh` blocks of the pages. tests/test_references.py checks
the links.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from owl2.eval.task_config import TaskConfig
from owl2.train.recipe_file import read_recipe
from tests.documents import blocks, commands, prose, require_command

ROOT = Path(__file__).parents[1]
GUIDES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md")
PAGES = [*GUIDES, *ROOT.glob("*.md"), ROOT / "docs/log.md", *ROOT.glob("docs/reference/**/*.md")]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Parts of recipes are completed with these settings.
MINIMAL_RECIPE = "{stage: 2, model: m, output: o, data: [{dataset: easy_vqa}]}"

on_each_guide = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_command_has_an_example():
    lines = [line for page in GUIDES for line in commands(read(page), ("", "sh"))]
    tables = re.findall(r"^\| `owl2 (\w+)` \|", read(ROOT / "README.md"), re.MULTILINE)
    assert {line.split()[1] for line in lines} >= set(tables)


@on_each_guide
def test_commands_and_their_options_exist(page):
    for line in commands(read(page), ("", "sh")):
        require_command(line)


@on_each_guide
def test_recipes_and_tasks_are_valid(page, tmp_path):
    (tmp_path / "minimal.yaml").write_text(MINIMAL_RECIPE, encoding="utf-8")
    for number, text in enumerate(blocks(read(page), "yaml")):
        if page.stem == "evaluation":
            for task in yaml.safe_load(text).values():
                TaskConfig.model_validate(task)
            continue
        file = tmp_path / f"{number}.yaml"
        complete = text if "base:" in text else f"base: minimal.yaml\n{text}"
        file.write_text(complete, encoding="utf-8")
        read_recipe(file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_make_targets_of_a_page_exist(page):
    text = read(page)
    files = re.findall(r"\b(?:owl2|recipes|tests)/[\w./-]+\.(?:yaml|py|sh|ipynb)\b", text)
    placeholder = re.compile(r"\b[A-Z]{3,}\b")  # task_configs/SUITE.yaml
    missing = [file for file in files if not (ROOT / file).exists()]
    assert not [file for file in missing if not placeholder.search(file)]
    targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)(?![\w/-])", text, re.MULTILINE))
    assert named <= targets


def test_guides_describe_the_current_version():
    """The history of the project is in CHANGELOG.md and the measurement log."""
    pages = [*GUIDES, *ROOT.glob("README*.md"), *ROOT.glob("docs/reference/*.md")]
    history = re.compile(r"earlier (?:development )?versions?\b|\bbefore,")
    found = [
        f"{page.name}: {text[0]}" for page in pages for text in history.finditer(read(page).lower())
    ]
    assert not found


def test_prose_has_at_most_120_characters_per_line():
    pages = [page for page in PAGES if page.name not in ("log.md", "study.md")]
    found = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in pages
        for line in prose(read(page)).splitlines()
        if len(line) > 120 and not line.startswith(("|", "!["))
    ]
    assert not found, "\n".join(found)


# ------------------------------------------------------------------ CONTRIBUTING.md


def call_paths() -> dict[str, list[tuple[str, str]]]:
    """(file, function) of each step of the call-path diagrams, by the heading of the diagram."""
    found = {}
    for section in CONTRIBUTING.split("\n### ")[1:]:
        for diagram in blocks(section, "text"):
            steps = re.findall(r"^\W*([\w/]+\.(?:py|cpp)) +(\S+)", diagram, re.MULTILINE)
            found[section.partition("\n")[0]] = steps
    return found


@cache
def definitions(file: Path) -> set[str]:
    """`function`, `Class`, and `Class.method` of a Python file; the identifiers of a C++ file."""
    if file.suffix == ".cpp":
        return set(re.findall(r"\w+", read(file)))
    found = set()
    for node in ast.parse(read(file)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if hasattr(item, "name")}
    return found


@pytest.mark.parametrize("path", call_paths())
def test_call_path_names_existing_functions_in_at_most_20_files(path):
    steps = call_paths()[path]
    missing = [
        f"{file} {function}"
        for file, function in steps
        if not (ROOT / "owl2" / file).is_file() or function not in definitions(ROOT / "owl2" / file)
    ]
    assert not missing, "\n".join(missing)
    assert 5 < len({file for file, _ in steps}) <= 20


def test_contributing_shows_three_call_paths():
    assert len(call_paths()) == 3


def test_layout_lists_every_package_and_directory():
    listed = set(re.findall(r"^\| `([\w./]+?)/?`", CONTRIBUTING, re.MULTILINE))
    packages = {f"owl2/{path.parent.name}" for path in ROOT.glob("owl2/*/__init__.py")}
    modules = {f"owl2/{path.name}" for path in ROOT.glob("owl2/*.py")} - {"owl2/__main__.py"}
    assert packages | modules | {"recipes", "tests", "docs", "examples"} <= listed
