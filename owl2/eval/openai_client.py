"""A client for OpenAI-compatible chat endpoints, with retries.

Temporary failures (a slow or busy server, an unusable reply) are retried with exponential backoff.
Permanent failures (an invalid key, an unknown model) raise immediately.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from owl2.errors import ErrorCode, InputError

API_KEY = "OPENAI_API_KEY"
MAX_BACKOFF_SECONDS = 60.0
MAX_REPLY_BYTES = 4 * 2**20
PERMANENT = {401: "the key", 403: "the key", 404: "the URL or the model"}  # what to check
TEMPORARY = (408, 409, 425, 429)

Parsed = TypeVar("Parsed")


class NoReplyError(Exception):
    """There is no usable reply after all attempts.

    Attributes:
        reached: Whether a server replied at all.
    """

    def __init__(self, reason: str, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


class _TemporaryError(NoReplyError):
    """A failure to retry, after `wait` seconds if the server requests it."""

    def __init__(self, reason: str, reached: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason, reached)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key must not be sent to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class ChatEndpoint:
    """A model behind an endpoint. The key, if required, is in ``OPENAI_API_KEY``.

    Attributes:
        url: With or without ``/chat/completions`` at the end.
        timeout: Seconds per attempt.
        attempts: Maximum number of attempts per prompt.
        backoff: Seconds before the second attempt, which double for each further one.
    """

    url: str
    model: str
    timeout: float = 60.0
    attempts: int = 4
    backoff: float = 1.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"{self.url!r} is not an endpoint such as https://api.openai.com/v1 or "
                "http://localhost:8000/v1.",
                ErrorCode.INVALID_VALUE,
            )

    def ask(
        self,
        prompt: str,
        parse: Callable[[str], Parsed | None],
        stop: threading.Event | None = None,
    ) -> tuple[Parsed, str]:
        """The parsed reply and its text.

        Args:
            parse: Returns None for an unusable reply, which is retried.
            stop: Once set, there are no further attempts.

        Raises:
            NoReplyError: All attempts failed, or the server rejects this prompt.
            InputError: The server rejects the key, the model or the URL.
        """
        stop = stop or threading.Event()
        for attempt in range(1, self.attempts + 1):
            try:
                reply = self._complete(prompt)
                parsed = parse(reply)
                if parsed is None:
                    raise _TemporaryError(f"unusable reply: {reply!r:.200}")
                return parsed, reply
            except _TemporaryError as error:
                if attempt == self.attempts:
                    raise NoReplyError(f"{error} ({attempt} attempts)", error.reached) from error
                wait = max(self.backoff * 2 ** (attempt - 1), error.wait)
                if stop.wait(min(wait, MAX_BACKOFF_SECONDS)):
                    raise NoReplyError(f"{error} (then stopped)", error.reached) from error
        raise ValueError(f"attempts is {self.attempts}; it must be 1 or more")

    def _complete(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 512,
        }
        url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": "owl2"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as reply:
                data = self._read(reply)
        except urllib.error.HTTPError as error:
            with error:
                raise self._http_error(error) from error
        except (http.client.HTTPException, OSError) as error:  # includes URLError and timeouts
            raise _TemporaryError(f"{self.url} does not answer: {error}", reached=False) from error
        try:
            content: Any = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise _TemporaryError(f"not a chat completion: {data[:200]!r}") from error
        if not isinstance(content, str):
            raise _TemporaryError(f"a chat completion without text: {data[:200]!r}")
        return content

    def _read(self, reply: http.client.HTTPResponse) -> bytes:
        """Read a reply within `timeout`; the timeout of the socket restarts with each byte."""
        data, deadline = b"", time.monotonic() + self.timeout
        while (part := reply.read1(MAX_REPLY_BYTES - len(data))) and len(data) < MAX_REPLY_BYTES:
            data += part
            if time.monotonic() > deadline:
                raise TimeoutError(f"the reply takes more than {self.timeout:g} s")
        return data

    def _http_error(self, error: urllib.error.HTTPError) -> Exception:
        code = error.code
        if code in (301, 302, 303, 307, 308):
            location = error.headers.get("Location")
            return InputError(
                f"{self.url} redirects to {location}. Use that URL.", ErrorCode.NETWORK
            )
        try:
            text = error.read(500).decode("utf-8", "replace").strip()
        except (http.client.HTTPException, OSError):
            text = str(error.reason)
        message = f"{self.url} answers {code}: {text[:200]}"
        if code in PERMANENT:
            state = "set" if os.environ.get(API_KEY) else "not set"
            return InputError(
                f"{message}. Check {PERMANENT[code]} (model {self.model!r}; {API_KEY} is {state}).",
                ErrorCode.NETWORK,
            )
        if code in TEMPORARY or code >= 500:
            wait = error.headers.get("Retry-After") or ""  # seconds, or a date, which is ignored
            return _TemporaryError(message, wait=float(wait) if wait.isdecimal() else 0.0)
        return NoReplyError(message, reached=True)
