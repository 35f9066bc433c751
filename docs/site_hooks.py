"""MkDocs hooks: pages and files outside docs/ become part of the site.

Links keep the form that works in the repository (`../recipes/x.yaml`, `docs/data.md`). The hooks
rewrite them for the site, so that MkDocs can check them.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "SECURITY.md")
PUBLISHED = {".ipynb", ".py", ".sh", ".txt", ".yaml"}  # files outside docs/ that pages link to
LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\s\"#:]+)(?=[)\s\"#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root pages and the files that pages link to."""
    for name in ROOT_PAGES:
        files.append(_file(ROOT / name, config))
    linked = {
        target
        for page in files.documentation_pages()
        for _, link in LINK.findall(page.content_string)
        if (target := (_source_of(page) / link).resolve()).suffix in PUBLISHED
    }
    for path in sorted(linked):
        if path.is_relative_to(ROOT) and path.is_file():
            files.append(_file(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between docs/ and the root of the repository."""

    def rewrite(match: re.Match[str]) -> str:
        target = (_source_of(page.file) / match[2]).resolve()
        uri = _site_uri(target)
        depth = page.file.src_uri.count("/")
        known = uri is not None and files.get_file_from_path(uri) is not None
        return f"{match[1]}{'../' * depth}{uri}" if known else match[0]

    return LINK.sub(rewrite, markdown)


def _file(path: Path, config: MkDocsConfig) -> File:
    return File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path))


def _source_of(file: File) -> Path:
    """The directory of a page in the repository."""
    return Path(file.abs_src_path or ROOT).parent


def _site_uri(path: Path) -> str | None:
    """The path within the site: docs/data.md is data.md, recipes/x.yaml keeps its path."""
    for base in (ROOT / "docs", ROOT):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return None


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove the `::` that introduces an indented block in a docstring."""
    return re.sub(r"::</p>", ":</p>", re.sub(r"<p>::</p>\n?", "", html))
