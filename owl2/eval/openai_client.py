"""A client for OpenAI-compatible chat endpoints, with retries.

Temporary failures (a slow or busy server, an unusable reply) are retried with exponential backoff.
Permanent failures (an invalid key, an unknown model) raise immediately.
"""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from owl2.errors import ErrorCode, InputError

API_KEY = "OPENAI_API_KEY"
MAX_BACKOFF_SECONDS = 60.0
PERMANENT = {401: "the key", 403: "the key", 404: "the URL or the model"}  # what to check
TEMPORARY = (408, 409, 425, 429)


class NoReplyError(Exception):
    """There is no usable reply.

    Attributes:
        reached: Whether a server replied at all.
        retry_after: Seconds before another attempt; None if it would fail as well.
    """

    def __init__(self, reason: str, reached: bool = True, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reached = reached
        self.retry_after = retry_after


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
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(
                f"{self.url!r} is not an endpoint such as https://api.openai.com/v1 or "
                "http://localhost:8000/v1.",
                ErrorCode.INVALID_VALUE,
            )

    async def ask(self, prompt: str, parse: Callable[[str], float | None]) -> tuple[float, str]:
        """The parsed reply and its text.

        Args:
            parse: Returns None for an unusable reply, which is retried.

        Raises:
            NoReplyError: All attempts failed, or the server rejects this prompt.
            InputError: The server rejects the key, the model or the URL.
        """
        async with httpx.AsyncClient(timeout=None) as client:
            for attempt in range(self.attempts):
                try:
                    reply = await self._complete(client, prompt)
                    if (parsed := parse(reply)) is not None:
                        return parsed, reply
                    failure = NoReplyError(f"unusable reply: {reply!r:.200}", retry_after=0.0)
                except NoReplyError as error:
                    if error.retry_after is None:
                        raise
                    failure = error
                if attempt < self.attempts - 1:
                    wait = max(self.backoff * 2**attempt, failure.retry_after or 0.0)
                    await asyncio.sleep(min(wait, MAX_BACKOFF_SECONDS))
        raise NoReplyError(f"{failure} ({self.attempts} attempts)", failure.reached)

    async def _complete(self, client: httpx.AsyncClient, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 512}
        url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        key = os.environ.get(API_KEY)
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            async with asyncio.timeout(self.timeout):  # of the complete reply
                response = await client.post(url, content=json.dumps(body), headers=headers)
        except (TimeoutError, httpx.HTTPError) as error:
            reason = str(error) or f"no reply within {self.timeout:g} s"
            message = f"{self.url} does not answer: {reason}"
            raise NoReplyError(message, reached=False, retry_after=0.0) from error
        code, text = response.status_code, response.text.strip()[:200]
        message = f"{self.url} answers {code}: {text}"
        if response.has_redirect_location:  # not followed: the key is for this host only
            location = response.headers["Location"]
            raise InputError(
                f"{self.url} redirects to {location}. Use that URL.", ErrorCode.NETWORK
            )
        if code in PERMANENT:
            state = "set" if key else "not set"
            raise InputError(
                f"{message}. Check {PERMANENT[code]} (model {self.model!r}; {API_KEY} is {state}).",
                ErrorCode.NETWORK,
            )
        if code in TEMPORARY or code >= 500:
            wait = response.headers.get("Retry-After", "")  # seconds, or a date, which is ignored
            raise NoReplyError(message, retry_after=float(wait) if wait.isdecimal() else 0.0)
        if not response.is_success:
            raise NoReplyError(message)
        try:
            content: Any = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise NoReplyError(f"not a chat completion with text: {text!r}", retry_after=0.0)
        return content
