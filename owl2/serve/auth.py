"""API keys.

Only digests are stored, so that no message, log line or dump of the objects contains a key.
"""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from owl2.errors import ErrorCode, InputError
from owl2.serve.errors import ApiError

MIN_LENGTH = 8


class ApiKeys:
    """The accepted API keys.

    Args:
        keys: Plain text.
        source: Where they come from, for error messages.

    Raises:
        InputError: There are no keys, or a key has fewer than 8 characters or characters that a
            header cannot contain.
    """

    def __init__(self, keys: Sequence[str], source: str = "API keys") -> None:
        if not keys:
            raise InputError(f"{source}: no API keys found.", ErrorCode.MISSING_VALUE)
        for number, key in enumerate(keys, 1):
            # The message must not contain the key.
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise InputError(
                    f"{source}: key {number} contains spaces or characters outside ASCII, which "
                    "the Authorization header does not allow. Use letters, digits, '-' and '_'.",
                    ErrorCode.INVALID_VALUE,
                )
            if len(key) < MIN_LENGTH:
                raise InputError(
                    f"{source}: key {number} has {len(key)} characters; use at least {MIN_LENGTH}, "
                    "for example from `openssl rand -hex 32`.",
                    ErrorCode.INVALID_VALUE,
                )
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def from_env(cls, name: str) -> "ApiKeys":
        """Keys from an environment variable, separated by commas."""
        keys = [key.strip() for key in os.environ.get(name, "").split(",")]
        return cls([key for key in keys if key], f"Environment variable {name}")

    @classmethod
    def from_file(cls, path: str | Path) -> "ApiKeys":
        """Keys from a text file, one per line; empty lines and lines that start with # are ignored.

        Raises:
            InputError: The file cannot be read, or see `ApiKeys`.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(
                f"The API keys in {path} cannot be read: {reason}.", ErrorCode.UNREADABLE_FILE
            ) from error
        keys = [line.strip() for line in lines]
        return cls([key for key in keys if key and not key.startswith("#")], str(path))

    def check(self, authorization: bytes | None) -> None:
        """Check the value of a header `Authorization: Bearer KEY`.

        All digests are compared in constant time, so that the duration reveals nothing about keys.

        Raises:
            ApiError: 401.
        """
        if not authorization:
            raise _unauthorized("This server needs an API key: send 'Authorization: Bearer KEY'.")
        scheme, _, key = authorization.strip().partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise _unauthorized("The API key is not valid for this server.")


def _unauthorized(message: str) -> ApiError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)
