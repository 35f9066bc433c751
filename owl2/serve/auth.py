"""API keys: who may ask.

Only digests are kept, so that no message, log line or dump of this process's objects holds a key.
"""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from owl2.errors import InputError
from owl2.serve.errors import ApiError

SHORTEST = 8


class Keys:
    """The keys that a server takes; any one of them opens it.

    Raises:
        InputError: no key, one of fewer than 8 characters, or with characters that no header holds.
    """

    def __init__(self, keys: Iterable[str], source: str = "the API keys") -> None:
        given = list(keys)
        if not given:
            raise InputError(f"{source}: there is no key. Give at least one.")
        for number, key in enumerate(given, 1):
            # The message must not repeat it.
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise InputError(
                    f"{source}: key {number} holds spaces or characters beyond ASCII, which the "
                    "header Authorization cannot carry. Take letters, digits, '-' and '_'."
                )
            if len(key) < SHORTEST:
                raise InputError(
                    f"{source}: key {number} has {len(key)} characters and would be guessed; take "
                    f"{SHORTEST} at least (`openssl rand -hex 32` makes a good one)."
                )
        self._digests = [_digest(key) for key in given]

    @classmethod
    def from_env(cls, name: str) -> "Keys":
        """Those in an environment variable, with commas between."""
        value = os.environ.get(name, "")
        keys = [key.strip() for key in value.split(",") if key.strip()]
        return cls(keys, f"The environment variable {name}")

    @classmethod
    def from_file(cls, path: str | Path) -> "Keys":
        """Those in a text file, one a line; empty lines and lines that begin with # are left out.

        Raises:
            InputError: also if it cannot be read.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
            raise InputError(f"The file of API keys {path} cannot be read: {reason}.") from error
        keys = [line.strip() for line in lines]
        return cls([key for key in keys if key and not key.startswith("#")], str(path))

    def check(self, authorization: bytes | None) -> None:
        """Let a request pass, or not, by its header `Authorization: Bearer KEY`.

        How long it takes tells nothing of the keys: all are compared, and by their digests.

        Raises:
            ApiError: 401.
        """
        if not authorization:
            raise _refused("This server asks for an API key: send 'Authorization: Bearer KEY'.")
        scheme, _, key = authorization.strip().partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(fits):
            raise _refused("The API key is not one of this server's.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _refused(message: str) -> ApiError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)
