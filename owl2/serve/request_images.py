"""A request's messages → messages for the engine, every image in them small, RGB and harmless.

::

    data:…;base64,… ──────────► file's bytes ──Decoders──► (size, size) RGB ──► {"type": "image"}
    https://… ──fetch, if on──► ▲

| what is wrong | status | code |
|---|---|---|
| neither of the two above, or fetching is off, or not possible | 400 | invalid_image_url |
| no base64 | 400 | invalid_base64 |
| too many bytes or pixels, too much memory or time | 400 | image_too_large |
| not an image, or a broken one | 400 | invalid_image |

A path of the server (`file:`, or bare) is never opened.
"""

import asyncio
import base64
import binascii
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from owl2.processing.chat_template import Message
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve.errors import SHOWN, ApiError
from owl2.serve.image_decoder import Decoders
from owl2.serve.image_fetch import Network, fetch
from owl2.serve.limits import Limits
from owl2.serve.protocol import ChatMessage, ImagePart, ImageUrl

FETCHES = 16  # at a time: a slow server somewhere holds up no other image


class Images:
    """Opens the images of requests; `messages` is called in the event loop.

    Args:
        like: the engine's image processor.
        network: another one, for tests.
    """

    def __init__(
        self, limits: Limits, like: Owl2ImageProcessor, network: Network | None = None
    ) -> None:
        self._limits = limits
        self._network = network or Network()
        self._decoders = Decoders(limits, like)
        self._decoding = ThreadPoolExecutor(limits.decoders, "owl2-image")
        self._fetching = ThreadPoolExecutor(FETCHES, "owl2-fetch")

    def start(self) -> None:
        """Begin what takes seconds: the first image will not wait for it."""
        self._decoders.start()

    def close(self) -> None:
        """Take no more; without waiting for what is being opened."""
        self._decoding.shutdown(wait=False, cancel_futures=True)
        self._fetching.shutdown(wait=False, cancel_futures=True)

    async def messages(self, given: Sequence[ChatMessage]) -> list[Message]:
        """As `Engine.complete` takes them; images are `PIL.Image`s of the model's size.

        The engine makes of them exactly the pixels that it makes of their files.

        Raises:
            ApiError: 400; `param` names the image.
        """
        places = {
            (row, column): part.image_url
            for row, message in enumerate(given)
            for column, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        }
        opened = await asyncio.gather(*(self._open(*item) for item in places.items()))
        images = dict(zip(places, opened, strict=True))
        return [_message(row, message, images) for row, message in enumerate(given)]

    async def _open(self, place: tuple[int, int], image: ImageUrl) -> Image.Image:
        loop = asyncio.get_running_loop()
        try:
            scheme = image.url[:8].lower()
            if scheme.startswith("data:"):
                return await loop.run_in_executor(self._decoding, self._open_data, image.url)
            if not scheme.startswith(("http://", "https://")):
                raise _bad_url(
                    "an image is given as data:image/...;base64,... (or as an https:// URL, where "
                    "the server fetches those); paths and other things are not read"
                )
            return await self._open_remote(image.url)
        except ApiError as error:
            error.param = f"messages.{place[0]}.content.{place[1]}.image_url.url"
            raise

    def _open_data(self, uri: str) -> Image.Image:
        return self._decoders.decode(_data_of(uri, self._limits.image_bytes))

    async def _open_remote(self, url: str) -> Image.Image:
        if not self._limits.remote:
            raise _bad_url(
                "this server fetches no images; send the image itself, as data:image/png;base64,..."
            )
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._fetching, fetch, url, self._limits, self._network)
        seconds = self._limits.remote_seconds
        try:
            # The look-up of a name has no limit of its own; and there may be a queue.
            data = await asyncio.wait_for(work, seconds + 1)
        except TimeoutError as error:
            raise _bad_url(f"it could not be fetched within {seconds:g} seconds") from error
        return await loop.run_in_executor(self._decoding, self._decoders.decode, data)


def _message(
    row: int, message: ChatMessage, images: dict[tuple[int, int], Image.Image]
) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": images[row, column]}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for column, part in enumerate(message.content)
    ]
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": parts}


def _data_of(uri: str, most: int) -> bytes:
    """The bytes in a data-URI (RFC 2397); its media type is not asked, as the bytes say it."""
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _bad_url(
            f"{header[:SHOWN]} is not the head of a data-URI in base64: data:image/png;base64,"
        )
    try:
        if not payload.isascii() or "%" in payload or any(map(str.isspace, payload[:SHOWN])):
            payload = "".join(urllib.parse.unquote(payload).split())
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"The image holds no valid base64: {error}.", code="invalid_base64"
        ) from error
    if len(data) > most:
        raise ApiError(
            400,
            f"The image has {len(data):,} bytes; this server's limit is {most:,}.",
            code="image_too_large",
        )
    return data


def _bad_url(reason: str) -> ApiError:
    return ApiError(400, f"The image cannot be opened: {reason}.", code="invalid_image_url")
