"""Messages of a request ──► messages for the engine, with decoded images and frames of videos.

::

    data:...;base64,... ─────────────► bytes ──SandboxedImageDecoder──► (size, size) RGB images
    https://... ──fetch_image──────────▲

| error | status | code |
|---|---|---|
| neither of the two, or a URL that is not allowed or cannot be fetched | 400 | invalid_image_url |
| invalid base64 | 400 | invalid_base64 |
| too many bytes or pixels, too much memory or time | 400 | image_too_large |
| not an image, or corrupt | 400 | invalid_image |

The codes of videos are `invalid_video_url`, `invalid_base64`, `video_too_large`, `invalid_video`.
Paths of the server (`file:` or without a scheme) are never opened.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from owl2.processing.image_io import ImagePolicy
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.media_file import decode_base64
from owl2.processing.messages import Message
from owl2.serve.admission import InflightBytes
from owl2.serve.config import ServerLimits
from owl2.serve.errors import MAX_VALUE_LENGTH, ApiError, about_video
from owl2.serve.image_decoder import ImageBudget, SandboxedImageDecoder
from owl2.serve.image_fetch import PublicNetwork, fetch_image, invalid_url
from owl2.serve.json_body import run_by_size
from owl2.serve.message_protocol import (
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartVideoParam,
    ChatCompletionMessageParam,
    ImageURL,
    Media,
    VideoURL,
    find_media,
)

_ROLES = {"developer": "system", "tool": "user", "function": "user"}


class RequestImages:
    """Decodes the images and videos of requests.

    Args:
        inflight: Counts fetched files until they are decoded.
        network: Replaced in tests.
    """

    def __init__(
        self,
        limits: ServerLimits,
        processor: Owl2ImageProcessor,
        inflight: InflightBytes,
        network: PublicNetwork | None = None,
    ) -> None:
        self.decoder = SandboxedImageDecoder(limits, processor)
        self._limits = limits
        self._network = network or PublicNetwork()
        self._inflight = inflight

    async def messages(
        self,
        requested: Sequence[ChatCompletionMessageParam],
        policy: ImagePolicy | None = None,
    ) -> list[Message]:
        """The messages for the engine, with images and frames of videos in place of files.

        The images have the model's size. Their pixel values equal those of the files.

        Args:
            policy: Instead of the image policy of the checkpoint.

        Raises:
            ApiError: 400; `param` is the path of the image or video.
        """
        opened = await self.open_all(find_media(requested), policy)
        messages: list[Message] = []
        for row, message in enumerate(requested):
            parts: list[dict[str, Any]] = []
            for column, part in enumerate(message.parts):
                if isinstance(part, ChatCompletionContentPartImageParam):
                    parts.append({"type": "image", "image": opened[row, column]})
                elif isinstance(part, ChatCompletionContentPartVideoParam):
                    parts.append({"type": "video", "video": opened[row, column]})
                else:
                    parts.append({"type": "text", "text": part.text})
            role = _ROLES.get(message.role, message.role)
            messages.append({"role": role, "content": parts})
        return messages

    async def open_all(self, urls: Media, policy: ImagePolicy | None = None) -> dict[Any, Any]:
        """Images, and lists of frames of videos, by the indices of `urls`, in the model's size.

        Args:
            policy: Instead of the image policy of the checkpoint.

        Raises:
            ApiError: 400; `param` is the path of the image or video.
        """
        budget = ImageBudget.of_request(self._limits)
        tasks = [asyncio.ensure_future(self._open(*item, budget, policy)) for item in urls.items()]
        try:
            return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
        finally:  # after an error, the other images are not decoded
            for task in tasks:
                task.cancel()

    async def _open(
        self,
        indices: tuple[int, int],
        media: ImageURL | VideoURL,
        budget: ImageBudget,
        policy: ImagePolicy | None,
    ) -> Image.Image | list[Image.Image]:
        kind = "video" if isinstance(media, VideoURL) else "image"
        try:
            with self._inflight.count() as add:
                data = await self._read(media.url, kind, add)
                if kind == "video":
                    return await self.decoder.decode_video(data, budget, policy)
                return await self.decoder.decode(data, budget, policy)
        except ApiError as error:
            found = about_video(error) if kind == "video" else error
            found.param = f"messages.{indices[0]}.content.{indices[1]}.{kind}_url.url"
            raise found from error.__cause__

    async def _read(self, url: str, kind: str, on_received: Callable[[int], None]) -> bytes:
        """The file of a data URI, or of an http(s) URL; `on_received` gets the sizes of its parts.

        Raises:
            ApiError: 400.
        """
        limits = self._limits
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return await run_by_size(_read_data_uri, url)
        if not scheme.startswith(("http://", "https://")):
            raise invalid_url(
                f"{kind}s must be data:{kind}/...;base64,... (or https:// URLs, if this server "
                "fetches them); files are not opened"
            )
        if not limits.allow_remote_images:
            raise invalid_url(
                f"this server does not fetch {kind}s; send the file as data:{kind}/...;base64,..."
            )
        size = limits.max_video_bytes if kind == "video" else limits.max_image_bytes
        return await fetch_image(url, size, limits, self._network, on_received)


def _read_data_uri(uri: str) -> bytes:
    """The bytes of a data URI (RFC 2397); its media type is ignored."""
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise invalid_url(
            f"{header[:MAX_VALUE_LENGTH]} is not the header of a base64 data URI "
            "(data:image/png;base64,)"
        )
    try:
        return decode_base64(payload)
    except ValueError as error:
        raise ApiError(
            400, f"The image is not valid base64: {error}.", code="invalid_base64"
        ) from error
