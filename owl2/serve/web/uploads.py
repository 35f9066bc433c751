"""Uploaded files of the page: owners, quotas and deletion.

::

    temporary directory of the server / uploads-… / one directory per upload / digest / file

The directory of a server that was killed is deleted when the next one starts.
"""

import asyncio
import atexit
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError

PREFIX = "owl2-web-"
LOCK = "lock"
ALL = ""  # the key of all clients together
# Bytes that a file occupies in addition to its content: two directories and a block.
FILE_OVERHEAD = 12 * 1024

logger = logging.getLogger(__name__)


def create_private_directory(parent: str | None = None) -> str:
    """Create a directory for this process, readable by its user, and delete those of killed ones.

    It is deleted at the end of the process.

    Args:
        parent: Default: the system's directory for temporary files.
    """
    parent = os.path.realpath(parent or tempfile.gettempdir())
    os.makedirs(parent, exist_ok=True)
    _delete_leftovers(parent)
    # It has another name until it is locked: another process must not take it for a leftover.
    unlocked = tempfile.mkdtemp(dir=parent)
    lock = os.open(os.path.join(unlocked, LOCK), os.O_CREAT | os.O_RDWR, 0o600)  # never closed
    fcntl.flock(lock, fcntl.LOCK_EX)
    directory = os.path.join(parent, PREFIX + os.path.basename(unlocked))
    os.rename(unlocked, directory)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _delete_leftovers(parent: str) -> None:
    for entry in os.scandir(parent):
        if not entry.name.startswith(PREFIX) or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            with open(os.path.join(entry.path, LOCK)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner runs
                shutil.rmtree(entry.path, ignore_errors=True)
        except OSError:
            continue


@dataclass
class Upload:
    """An upload: its visitor, its client, the bytes that it occupies, and when it was used."""

    owner: str
    client: str
    size: int
    last_use: float


class UploadStore:
    """The uploads of a page.

    Args:
        parent: The directory that contains `directory`.
        limits: `max_upload_bytes` and `max_client_upload_bytes`.

    Attributes:
        directory: Contains the uploads.
        page_files: Files that every visitor may read.
    """

    def __init__(self, parent: str, limits: ServerLimits) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="uploads-", dir=parent))
        self.page_files: set[str] = set()
        self._limits = limits
        self._uploads: dict[str, Upload] = {}
        self._bytes: Counter[str] = Counter()  # of each client, and of all clients
        self._logged: set[str] = set()

    def begin(self, owner: str, client: str) -> Path:
        """Create the directory of a new upload.

        Args:
            owner: The visitor.
            client: As from `client_network`.
        """
        name = secrets.token_hex(16)
        (self.directory / name).mkdir(parents=True, mode=0o700)
        self._uploads[name] = Upload(owner, client, 0, time.time())
        return self.directory / name

    def add(self, directory: Path, size: int) -> None:
        """Count bytes of an upload.

        Raises:
            ApiError: A quota is exceeded: 429 for the client, 507 for all of them.
        """
        upload = self._uploads[directory.name]
        upload.size += size
        self._bytes.update({upload.client: size, ALL: size})
        if self._bytes[upload.client] > self._limits.max_client_upload_bytes:
            raise self._quota_exceeded(429, "from this address", "--max-client-upload-bytes")
        if self._bytes[ALL] > self._limits.max_upload_bytes:
            raise self._quota_exceeded(507, "to this server", "--max-upload-bytes")

    def _quota_exceeded(self, status: int, whose: str, option: str) -> ApiError:
        if option not in self._logged:  # once, until uploads are deleted
            self._logged.add(option)
            logger.warning("uploads are rejected: their size has reached %s", option)
        return ApiError(
            status,
            f"The uploads {whose} have reached their maximum size. Uploads are deleted after some "
            "hours; retry later.",
            code="upload_quota_exceeded",
            headers={"Retry-After": "3600"},
        )

    def can_read(self, visitor: str, path: str) -> bool:
        """Whether `path` is an existing file that this visitor uploaded, or a file of the page."""
        if path in self.page_files:
            return os.path.isfile(path)
        file = Path(path)
        if ".." in file.parts or len(file.parents) < 3 or file.parents[2] != self.directory:
            return False
        upload = self._uploads.get(file.parents[1].name)
        if upload is None or upload.owner != visitor or not os.path.isfile(path):
            return False
        upload.last_use = time.time()  # it belongs to a conversation that continues
        return True

    def delete(self, directory: Path) -> None:
        """Delete an upload."""
        shutil.rmtree(directory, ignore_errors=True)
        self._forget(directory)

    async def delete_expired(self, max_age: float) -> None:
        """Delete the uploads that were not used for `max_age` seconds."""
        self._logged.clear()
        oldest = time.time() - max_age
        for name in [name for name, one in self._uploads.items() if one.last_use < oldest]:
            await asyncio.to_thread(shutil.rmtree, self.directory / name, ignore_errors=True)
            self._forget(self.directory / name)

    def _forget(self, directory: Path) -> None:
        if directory.exists():  # it still counts, and is deleted later
            logger.warning("an upload could not be deleted: %s", directory)
        elif upload := self._uploads.pop(directory.name, None):
            for key in (upload.client, ALL):
                self._bytes[key] -= upload.size
            self._bytes += Counter()  # removes the keys without bytes

    def close(self) -> None:
        """Delete all uploads."""
        self._uploads.clear()
        self._bytes.clear()
        shutil.rmtree(self.directory, ignore_errors=True)
