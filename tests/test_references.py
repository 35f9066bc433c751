"""References between the files of the repository resolve.

Each test collects all violations, so that one run reports every file to correct.
"""

import functools
import json
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE_PAGES = {
    "Specification": Path("docs/reference/specification.md"),
    "Model family": Path("docs/reference/model-family.md"),
}
SOURCE_SUFFIXES = {".cpp", ".h", ".ipynb", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"}
# Documents that are not part of the repository.
EXTERNAL_DOCUMENTS = re.compile(
    r"\b(?:SPEC|USERS|FAMILY|DESIGN|REDESIGN|REVIEW|STYLE)(?:\.md\b|,?\s+§?\d)"
    r"|\bSPEC\b|\b(?i:issues?) #?\d+|\.\./shared\b|/work/"
)
SECTIONS = r"§\d+(?:\.\d+)*(?:(?:, | and |–|, and )§\d+(?:\.\d+)*)*"
FENCE = re.compile(r"^([ \t]*)(```+|~~~+).*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)


@functools.cache
def tracked_files() -> list[Path]:
    """Tracked text files, relative to the root, without this test."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    files = [Path(name) for name in listing.split("\0") if name]
    own = Path(__file__).relative_to(ROOT)
    return [file for file in files if file.suffix in SOURCE_SUFFIXES and file != own]


def pages_with_links() -> list[Path]:
    return [
        file
        for file in tracked_files()
        if file.suffix in {".md", ".ipynb"}
        and (len(file.parts) == 1 or file.parts[0] in {"docs", "examples"})
    ]


@functools.cache
def read(file: Path) -> str:
    """The text of a file. For a notebook, the text of its Markdown cells."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def read_unwrapped(file: Path) -> str:
    """The text of a file with one space in place of each line break and comment marker."""
    return re.sub(r"\s*\n\s*(?:(?:#|//|\*|>)\s+)?", " ", read(file))


@functools.cache
def headings(file: Path) -> list[str]:
    return re.findall(r"^#{1,6} (.+?)\s*$", FENCE.sub("", read(file)), re.MULTILINE)


@functools.cache
def anchors(file: Path) -> set[str]:
    """The anchors that GitHub and MkDocs assign to the headings of a page."""
    found: set[str] = set()
    for heading in headings(file):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text).strip())
        found.add(slug if slug not in found else f"{slug}-{sum(a.startswith(slug) for a in found)}")
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", read(file)))


def sections(page: Path) -> set[str]:
    """The numbers of the headings of a reference page, e.g. {"1", "1.1"}."""
    numbers = (re.match(r"(\d+(?:\.\d+)*)\.? ", heading) for heading in headings(page))
    return {number[1] for number in numbers if number}


@pytest.mark.parametrize("name", REFERENCE_PAGES)
def test_referenced_sections_exist(name):
    known = sections(REFERENCE_PAGES[name])
    assert known
    missing = [
        f"{file}: {name} §{number}"
        for file in tracked_files()
        for reference in re.findall(rf"{name} ({SECTIONS})", read_unwrapped(file))
        for number in re.findall(r"[\d.]*\d", reference)
        if number not in known
    ]
    assert not missing, "\n".join(missing)


def test_every_section_reference_names_its_page():
    """Within a reference page, a section number without a name refers to that page."""
    names = "|".join(REFERENCE_PAGES)
    violations = []
    for file in tracked_files():
        rest = re.sub(rf"(?:{names}) {SECTIONS}", "", read_unwrapped(file))
        own = sections(file) if file in REFERENCE_PAGES.values() else set()
        numbers = re.findall(r"§\s*(\d+(?:\.\d+)*)", rest)
        violations += [f"{file}: §{number}" for number in numbers if number not in own]
    assert not violations, "\n".join(violations)


def test_no_reference_to_documents_outside_the_repository():
    violations = [
        f"{file}: {match[0]}"
        for file in tracked_files()
        for match in EXTERNAL_DOCUMENTS.finditer(read_unwrapped(file))
    ]
    assert not violations, "\n".join(violations)


def test_relative_links_of_pages_resolve():
    broken = []
    for page in pages_with_links():
        prose = re.sub(r"(`+).+?\1", "", FENCE.sub("", read(page)))
        targets = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", prose)
        targets += re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", prose)
        for target in targets:
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            file = Path((ROOT / page.parent / path).resolve()) if path else ROOT / page
            if not file.exists() or not file.is_relative_to(ROOT):
                broken.append(f"{page}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file.relative_to(ROOT)):
                broken.append(f"{page}: {target} (no such heading)")
    assert not broken, "\n".join(broken)
