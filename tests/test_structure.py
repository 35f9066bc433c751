"""The structure of the package: sizes of files, names of classes, imports, vocabulary."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "owl2").rglob("*.py"))
# `make test-clients` installs packages of others below `tests`.
TESTS = [p for p in (ROOT / "tests").rglob("*") if "node_modules" not in p.parts]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCES
}
PACKAGES = sorted({name.split(".")[1] for name in MODULES if name.count(".") > 1})
MAX_LINES = 400
MAX_IMPORT_CHAIN = 8


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def top_level_imports(module: str) -> set[str]:
    """The modules of owl2 that `module` imports when it is imported itself."""
    found = set()
    for node in tree_of(MODULES[module]).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in submodules}
    return {name for name in found if name in MODULES} - {module}


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest path in `graph`. Raises `AssertionError` if the graph has a cycle."""
    finished: dict[str, list[str]] = {}

    def visit(node: str, path: tuple[str, ...]) -> list[str]:
        assert node not in path, f"circular import: {' -> '.join([*path, node])}"
        if node not in finished:
            chains = [visit(other, (*path, node)) for other in sorted(graph[node])]
            finished[node] = [node, *max(chains, key=len, default=[])]
        return finished[node]

    return max((visit(node, ()) for node in graph), key=len)


@pytest.mark.parametrize("package", PACKAGES)
def test_import_chains_are_short_and_not_circular(package):
    prefix = f"owl2.{package}."
    names = [name for name in MODULES if name.startswith(prefix)]
    inside = {name: {m for m in top_level_imports(name) if m in names} for name in names}
    chain = longest_chain(inside)
    assert len(chain) <= MAX_IMPORT_CHAIN, " -> ".join(chain)


def test_the_package_has_no_circular_imports():
    longest_chain({name: top_level_imports(name) - {"owl2"} for name in MODULES})


def test_files_are_short():
    paths = [*(ROOT / "owl2").rglob("*"), *TESTS]
    files = [path for path in paths if path.suffix in {".py", ".h", ".cpp"}]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {path: count for path, count in lengths.items() if count > MAX_LINES}


def test_no_two_public_classes_share_a_name():
    places = defaultdict(list)
    for module, path in MODULES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def identifiers(path: Path) -> set[str]:
    """All names that `path` defines or uses, and its own name."""
    found = {path.stem}
    for node in ast.walk(tree_of(path)):
        for field in ("name", "id", "attr", "arg"):
            value = getattr(node, field, None)
            found |= {value} if isinstance(value, str) else set()
    return found


def test_identifiers_say_image():
    files = [*SOURCES, *(p for p in TESTS if p.suffix == ".py"), *(ROOT / "recipes").rglob("*.py")]
    with_word = [path for path in files if "picture" in path.read_text(encoding="utf-8").lower()]
    named = {name for path in with_word for name in identifiers(path)}
    assert not [name for name in named if "picture" in name.lower() and name not in THIS_FILE]


THIS_FILE = identifiers(Path(__file__))

# Words of an earlier private vocabulary, with the standard terms that replace them.
RETIRED = {
    r"\bpictures?\b": "image",
    r"\banew\b": "again",
    r"\bnurser(y|ies)\b": "fork server",
    r"\bgo(es)? on (from|with|where)\b": "resume",
    r"\bleft[ _-]out\b": "skipped",
    r"\b(quantis|normalis|initialis|optimis|serialis|tokenis|visualis)": "-ize",
    r"\b[Cc]olour": "color",
    r"\bblind\b": "no-image baseline",
    r"\btextbook": "baseline",
    r"\bnobody\b|\bsomebody\b": "the client, the user",
    r"\bdata sets?\b": "dataset",
}
# Quotations: prompts of published models, keys of other formats, the official contractions.
QUOTING = {
    ("owl2/data/media_keys.py", r"\bpictures?\b"),
    ("docs/reference/model-family.md", r"\bpictures?\b"),
    ("owl2/data/soft_labels.py", r"\bpictures?\b"),
    ("owl2/eval/metrics/vqa.py", r"\bnobody\b|\bsomebody\b"),
}
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "recipes").rglob("*.yaml"),
    *(ROOT / "owl2").rglob("*.yaml"),
]


@pytest.mark.parametrize("pattern", RETIRED, ids=RETIRED.values())
def test_documents_and_code_use_standard_terms(pattern):
    found = []
    for path in [*SOURCES, *DOCUMENTS]:
        if (path.relative_to(ROOT).as_posix(), pattern) in QUOTING:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join([f"say {RETIRED[pattern]!r}:", *found])
