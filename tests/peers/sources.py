"""The tests of transformers and PEFT: unpacked by `make test-peers`, imported by tests/peers.

The sdists on PyPI contain the common testers. The sdist of transformers lacks its subfolders
(generation, exporters, pipelines). A checkout of the same version adds them: set
TRANSFORMERS_CHECKOUT to its path. Without a checkout, tests/peers/generation.py replaces them.

Nothing from these sources is part of the repository.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

SOURCES = Path(sys.prefix) / "sources"
SAMPLE_TEXT = "This is a line of text.\n\nThis is another line, with numbers: 1, 2, 3.\n" * 8
REPLACEMENTS = {
    "generation.test_utils": "generation",
    "exporters.test_export": "generation",
    "utils.test_configuration_utils": "generation",
}


def download(versions: dict[str, str]) -> None:
    """Download and unpack the sdists of `versions` (package to version) into `SOURCES`."""
    SOURCES.mkdir(exist_ok=True)
    for package, version in versions.items():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run([*pip, package, f"{package}=={version}", "--dest", SOURCES], check=True)
        with tarfile.open(SOURCES / f"{package}-{version}.tar.gz") as archive:
            archive.extractall(SOURCES, filter="data")
        shutil.rmtree(SOURCES / package, ignore_errors=True)
        (SOURCES / f"{package}-{version}").rename(SOURCES / package)
    tests = SOURCES / "transformers" / "tests"
    if checkout := os.environ.get("TRANSFORMERS_CHECKOUT"):
        for file in Path(checkout, "tests").rglob("*"):
            target = tests / file.relative_to(Path(checkout, "tests"))
            if file.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    (tests / "__init__.py").touch()
    sample = tests / "fixtures" / "sample_text.txt"
    if not sample.exists():
        sample.parent.mkdir(exist_ok=True)
        sample.write_text(SAMPLE_TEXT)


def add_to_path() -> None:
    """Make the sources importable as part of the namespace package `tests`."""
    import tests

    folders = [str(SOURCES / package / "tests") for package in ("transformers", "peft")]
    tests.__path__ = [*tests.__path__, *folders]  # type: ignore[assignment]  # becomes a list
    for name, replacement in REPLACEMENTS.items():
        exists = Path(folders[0], *name.split(".")).with_suffix(".py").exists()
        if not exists or name.startswith("utils."):  # utils import a module outside tests/
            module = importlib.import_module(f"tests.peers.{replacement}")
            sys.modules[f"tests.{name}"] = module
    sys.modules["fetch_hub_objects_for_ci"] = importlib.import_module("tests.peers.generation")


if __name__ == "__main__":
    from importlib.metadata import version

    download({package: version(package) for package in ("transformers", "peft")})
