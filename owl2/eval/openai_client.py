"""An OpenAI-compatible chat endpoint, asked patiently.

What passes (a slow or busy server, a broken reply) is tried again, with waits that double. What
does not (a refused key, an unknown model) is the user's, and said at once.
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

from owl2.errors import InputError

KEY = "OPENAI_API_KEY"
LONGEST_WAIT_SECONDS = 60.0
MAX_REPLY_BYTES = 4 * 2**20
REFUSED = {401: "the key", 403: "the key", 404: "the URL or the model"}

Read = TypeVar("Read")


class NoReply(Exception):
    """No reply that could be used, after all attempts; says why.

    Attributes:
        reached: whether a server answered at all.
    """

    def __init__(self, reason: str, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is for the host that the user named, and no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class _Passing(Exception):
    """What may be better next time; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, reached: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reached = reached
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked. The key, if one is needed, is in ``OPENAI_API_KEY``.

    Attributes:
        url: with or without ``/chat/completions`` at its end.
        timeout: seconds for one attempt.
        attempts: how often one thing is asked.
        wait: seconds before the second attempt; twice that before the third, and so on.
    """

    url: str
    model: str
    timeout: float = 60.0
    attempts: int = 4
    wait: float = 1.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"{self.url!r} is no endpoint; give one such as https://api.openai.com/v1 or "
                "http://localhost:8000/v1."
            )

    def ask(
        self,
        prompt: str,
        read: Callable[[str], Read | None],
        stop: threading.Event | None = None,
    ) -> tuple[Read, str]:
        """What `read` finds in the model's reply, and the reply.

        Args:
            read: gives None for a reply that is of no use; that is tried again, too.
            stop: once it is set, nothing is tried again.

        Raises:
            NoReply: all attempts failed, or the server objects to this prompt.
            InputError: it refuses the key, or knows no such model or URL.
        """
        stop = stop or threading.Event()
        for attempt in range(1, self.attempts + 1):
            try:
                reply = self._complete(prompt)
                found = read(reply)
                if found is not None:
                    return found, reply
                raise _Passing(f"a reply that cannot be read: {reply!r:.200}")
            except _Passing as error:
                if attempt == self.attempts:
                    raise NoReply(f"{error} ({attempt} attempts)", error.reached) from error
                pause = max(self.wait * 2 ** (attempt - 1), error.wait)
                if stop.wait(min(pause, LONGEST_WAIT_SECONDS)):
                    raise NoReply(f"{error} (then stopped)", error.reached) from error
        raise ValueError(f"attempts is {self.attempts}; it must be 1 or more")

    def _complete(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 512,
        }
        try:
            with _OPENER.open(self._request(body), timeout=self.timeout) as reply:
                data = self._whole(reply)
        except urllib.error.HTTPError as error:
            with error:
                raise self._objection(error) from error
        except (http.client.HTTPException, OSError) as error:  # URLError and timeouts are OSErrors
            raise _Passing(f"{self.url} does not answer: {error}", reached=False) from error
        try:
            content: Any = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise _Passing(f"not a chat completion: {data[:200]!r}") from error
        if not isinstance(content, str):
            raise _Passing(f"a chat completion without text: {data[:200]!r}")
        return content

    def _whole(self, reply: http.client.HTTPResponse) -> bytes:
        """A server that sends a byte now and then would never be late by the socket's own clock."""
        data, until = b"", time.monotonic() + self.timeout
        while (some := reply.read1(MAX_REPLY_BYTES - len(data))) and len(data) < MAX_REPLY_BYTES:
            data += some
            if time.monotonic() > until:
                raise TimeoutError(f"the reply takes more than {self.timeout:g} s")
        return data

    def _request(self, body: dict[str, Any]) -> urllib.request.Request:
        url = self.url.rstrip("/")
        if not url.endswith("/chat/completions"):
            url += "/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": "owl2"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(url, json.dumps(body).encode(), headers)

    def _objection(self, error: urllib.error.HTTPError) -> Exception:
        try:
            words = error.read(500).decode("utf-8", "replace").strip()
        except (http.client.HTTPException, OSError):
            words = str(error.reason)
        said = f"{self.url} answers {error.code}: {words[:200]}"
        if error.code in (301, 302, 303, 307, 308):
            there = error.headers.get("Location")
            return InputError(f"{self.url} answers that it is elsewhere: give {there} as the URL.")
        if error.code in REFUSED:
            given = "is set" if os.environ.get(KEY) else "is not set"
            return InputError(
                f"{said}. Check {REFUSED[error.code]} (model {self.model!r}; {KEY} {given})."
            )
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            return _Passing(said, wait=_seconds(error.headers.get("Retry-After")))
        return NoReply(said, reached=True)


def _seconds(header: str | None) -> float:
    # The header may be a date, too; the usual wait does then.
    return float(header) if header is not None and header.isdecimal() else 0.0
