"""API keys.

Only digests are stored, so that no message, log line or dump of the objects contains a key.
"""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
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
    def read(cls, variable: str | None, file: str | Path | None) -> "ApiKeys | None":
        """Read keys from an environment variable or a text file; None if neither is given.

        Commas separate the keys of a variable. A file has one key per line; empty lines and lines
        that start with # are ignored.

        Raises:
            InputError: Both are given, the file cannot be read, or see `ApiKeys`.
        """
        if variable is not None and file is not None:
            raise InputError(
                "--api-key-env and --api-key-file exclude each other.", ErrorCode.CONFLICT
            )
        if variable is not None:
            keys = [key.strip() for key in os.environ.get(variable, "").split(",")]
            return cls(list(filter(None, keys)), f"Environment variable {variable}")
        if file is None:
            return None
        try:
            keys = [
                line.strip() for line in expand_user(file).read_text(encoding="utf-8").splitlines()
            ]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(
                f"The API keys in {file} cannot be read: {reason}.", ErrorCode.UNREADABLE_FILE
            ) from error
        return cls([key for key in keys if key and not key.startswith("#")], str(file))

    def is_valid(self, key: str) -> bool:
        """Whether `key` is accepted.

        All digests are compared in constant time, so that the duration reveals nothing about keys.
        """
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)

    def check(self, authorization: str) -> str:
        """Check the value of a header `Authorization: Bearer KEY`; an empty one is missing.

        Returns:
            The name of the client, which is the same for each spelling of the header.

        Raises:
            ApiError: 401.
        """
        scheme, _, key = authorization.strip().partition(" ")
        key = key.strip()
        if not (self.is_valid(key) and scheme.lower() == "bearer"):
            message = "This server needs an API key: send 'Authorization: Bearer KEY'."
            if authorization:
                # Clients search for the first words.
                message = "Incorrect API key provided: it is not valid for this server."
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        return hashlib.sha256(key.encode()).hexdigest()


def document_api_keys(app: FastAPI, public_paths: Sequence[str]) -> None:
    """Add the security scheme to the OpenAPI document, for all routes but the public ones."""
    make_document = app.openapi

    def openapi() -> dict[str, Any]:
        document = make_document()
        schemes = document["components"].setdefault("securitySchemes", {})
        schemes["apiKey"] = {"type": "http", "scheme": "bearer"}
        for path, methods in document["paths"].items():
            for operation in methods.values():
                if path not in public_paths:
                    operation["security"] = [{"apiKey": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's way to extend the document
