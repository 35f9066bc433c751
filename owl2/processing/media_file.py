"""Opens the file of an image or a video: a path, a URL, a data URI, a base64 string or bytes.

Does not import torch or transformers, as `image_io`.
"""

import base64
import http.client
import io
import os
import re
import stat
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

from owl2.errors import ErrorCode, InputError, shorten
from owl2.files import expand_user

# Of the files that are images in a folder.
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
URL_TIMEOUT_SECONDS = 20
URL_MAX_BYTES = 64 * 1024 * 1024
URL_SCHEMES = ("http", "https", "file", "data")
URL_RETRY_DELAYS = (0.5, 2.0)  # seconds
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)

# At least two letters: one letter is a Windows drive.
_SCHEME = re.compile(r"(data(?=:)|[a-z][a-z0-9+.-]+(?=://))", re.IGNORECASE)
_MIN_BASE64_LENGTH = 64
# Clients percent-encode no other characters. `unquote` takes ten seconds for a large body.
_ESCAPES = {f"%{ord(char):02X}": char for char in "+/=" + string.whitespace}
_ESCAPES |= {escape.lower(): char for escape, char in _ESCAPES.items()}


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, by name, without hidden files such as those of macOS.

    Raises:
        InputError: The folder does not exist or cannot be read.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise folder_error(folder, error) from error
    images = (file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
    return [file for file in images if not file.name.startswith(".")]


def folder_error(folder: Path, error: OSError) -> InputError:
    """The error for a folder that cannot be listed."""
    code = ErrorCode.UNREADABLE_FILE if os.path.isdir(folder) else ErrorCode.FILE_NOT_FOUND
    return InputError(f"The folder '{folder}' cannot be read: {error.strerror}.", code)


def open_file(
    source: Any, kind: str = "image", url_max_bytes: int | None = None
) -> tuple[BinaryIO, str]:
    """The encoded image or video in bytes, a path, a URL, a data URI or a base64 string.

    Args:
        kind: "image" or "video", for messages.
        url_max_bytes: Limit of a file that is fetched; default: `URL_MAX_BYTES`.

    Returns:
        The file and its name.

    Raises:
        InputError: It is missing or cannot be read; see `load_image`.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), f"the given file of {len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        raise image_error(
            f"an object of type {type(source).__name__}",
            f"is no {kind}: pass a path, a URL, bytes, a data URI or a base64 string.",
        )
    if isinstance(source, str):
        if not source.strip():
            raise image_error(f"the path of the {kind}", "is empty.")
        if scheme := _SCHEME.match(source):
            name = f"the {kind} at {shorten(source, 120, str)}"
            if scheme[1].lower() == "file":
                return _open_file(_file_url_path(source, name), name), name
            if scheme[1].lower() in URL_SCHEMES:
                return io.BytesIO(
                    _fetch(source, scheme[1].lower(), name, url_max_bytes or URL_MAX_BYTES)
                ), name
            raise image_error(
                name,
                f"cannot be read: {scheme[1]}:// is not supported. Download the {kind} and pass "
                "its path.",
            )
        if len(source) >= _MIN_BASE64_LENGTH and not os.path.exists(source):
            try:
                data = decode_base64(source)
            except ValueError:
                pass  # not base64: a path
            else:
                return io.BytesIO(data), f"the base64 string of {len(source)} characters"
    path = os.fspath(source)
    name = f"the {kind} file '{shorten(path, 1000, str)}'"
    return _open_file(expand_user(path), name), name


def _file_url_path(url: str, name: str) -> Path:
    found = re.match(r"file://(localhost)?(/[^#]*)", url, re.IGNORECASE)
    if found is None:
        raise image_error(
            name,
            "cannot be read: a file URL starts with file:/// or file://localhost/.",
            ErrorCode.MISSING_IMAGE,
        )
    return Path(urllib.request.url2pathname(found[2]))


def _open_file(path: Path, name: str) -> BinaryIO:
    """Open a regular file. A named pipe or a device could block forever, or have no end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
        raise OSError("It is not a regular file")
    except FileNotFoundError as error:
        raise image_error(
            name,
            f"does not exist (working directory: {Path.cwd()}). Check the path.",
            ErrorCode.MISSING_IMAGE,
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path
        raise image_error(name, f"cannot be read: {reason}.", ErrorCode.UNREADABLE_FILE) from error


def _fetch(url: str, scheme: str, name: str, max_bytes: int) -> bytes:
    is_remote = scheme in ("http", "https")
    header, _, payload = url.partition(",")
    if scheme == "data" and header.lower().endswith(";base64"):
        try:
            return decode_base64(payload)
        except ValueError as error:
            raise image_error(name, f"is not valid base64: {error}.") from error
    for delay in (*URL_RETRY_DELAYS, None):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "owl2"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as reply:
                data: bytes = reply.read(max_bytes + 1 if is_remote else -1)
                missing = getattr(reply, "length", None)
            if missing and len(data) <= max_bytes:
                raise http.client.IncompleteRead(data, missing)
            break
        except (http.client.HTTPException, OSError, ValueError) as error:  # URLError is an OSError
            if delay is not None and is_remote and _is_transient(error):
                time.sleep(delay)
                continue
            code = ErrorCode.BROKEN_IMAGE if scheme == "data" else ErrorCode.MISSING_IMAGE
            raise image_error(
                name, f"cannot be fetched: {shorten(error, 200, str)}.", code
            ) from error
    if is_remote and len(data) > max_bytes:
        raise image_error(
            name,
            f"is larger than {max_bytes // 2**20} MiB. Download it and pass its path.",
            ErrorCode.IMAGE_TOO_LARGE,
        )
    return data


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: an overloaded server, a broken connection."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in TRANSIENT_STATUS
    reason = getattr(error, "reason", error)
    return isinstance(reason, (http.client.IncompleteRead, ConnectionResetError))


def decode_base64(text: str) -> bytes:
    """The bytes of base64 in the standard or the URL-safe alphabet.

    White space, missing padding, and percent-encoding are accepted.

    Raises:
        ValueError: The text is not base64.
    """
    if "%" in text:
        for escape, char in _ESCAPES.items():
            text = text.replace(escape, char)
    data = text.encode("ascii").translate(None, string.whitespace.encode())
    if b"-" in data or b"_" in data:
        if b"+" in data or b"/" in data:
            raise ValueError("it mixes the standard and the URL-safe alphabet")
        data = data.translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)


def image_error(name: str, problem: str, code: ErrorCode = ErrorCode.BROKEN_IMAGE) -> InputError:
    """The error about an image or a video; the message starts with its name."""
    return InputError(f"{name[0].upper()}{name[1:]} {problem}", code)
