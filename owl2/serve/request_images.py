"""Messages of a request ──► messages for the engine, with decoded images.

::

    data:...;base64,... ─────────────► bytes ──SandboxedImageDecoder──► (size, size) RGB image
    https://... ──fetch_image──────────▲

| error | status | code |
|---|---|---|
| neither of the two, or a URL that is not allowed or cannot be fetched | 400 | invalid_image_url |
| invalid base64 | 400 | invalid_base64 |
| too many bytes or pixels, too much memory or time | 400 | image_too_large |
| not an image, or corrupt | 400 | invalid_image |

Paths of the server (`file:` or without a scheme) are never opened.
"""

import asyncio
from typing import Any

from PIL import Image

from owl2.processing.data_uri import decode_base64
from owl2.processing.image_io import ImagePolicy
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.messages import Message
from owl2.serve.admission import InflightBytes
from owl2.serve.config import ServerLimits
from owl2.serve.errors import MAX_VALUE_LENGTH, ApiError
from owl2.serve.image_decoder import ImageBudget, SandboxedImageDecoder
from owl2.serve.image_fetch import PublicNetwork, fetch_image, invalid_url
from owl2.serve.json_body import run_by_size
from owl2.serve.protocol import (
    ChatCompletionContentPartImageParam,
    ChatCompletionRequest,
    ImageURL,
)


class RequestImages:
    """Decodes the images of requests.

    Args:
        network: Replaced in tests.
        inflight: Counts fetched files until they are decoded. Default: with the limit of `limits`.
    """

    def __init__(
        self,
        limits: ServerLimits,
        processor: Owl2ImageProcessor,
        network: PublicNetwork | None = None,
        inflight: InflightBytes | None = None,
    ) -> None:
        self.decoder = SandboxedImageDecoder(limits, processor)
        self._limits = limits
        self._network = network or PublicNetwork()
        self._inflight = inflight or InflightBytes(limits.max_inflight_bytes)

    async def messages(
        self, request: ChatCompletionRequest, policy: ImagePolicy | None = None
    ) -> list[Message]:
        """The messages as the engine takes them; images are `PIL.Image`s of the model's size.

        The engine makes the same pixel values of them as of the files.

        Args:
            policy: Instead of the image policy of the checkpoint.

        Raises:
            ApiError: 400; `param` is the path of the image.
        """
        images = await self.open_all(request.images, policy)
        messages: list[Message] = []
        for row, message in enumerate(request.messages):
            parts: list[dict[str, Any]] = [
                {"type": "image", "image": images[row, column]}
                if isinstance(part, ChatCompletionContentPartImageParam)
                else {"type": "text", "text": part.text}
                for column, part in enumerate(message.parts)
            ]
            role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
            messages.append({"role": role, "content": parts})
        return messages

    async def open_all(
        self, urls: dict[tuple[int, int], ImageURL], policy: ImagePolicy | None = None
    ) -> dict[tuple[int, int], Image.Image]:
        """Images by the indices of their message and their content part, in the model's size.

        Args:
            policy: Instead of the image policy of the checkpoint.

        Raises:
            ApiError: 400; `param` is the path of the image.
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
        image: ImageURL,
        budget: ImageBudget,
        policy: ImagePolicy | None,
    ) -> Image.Image:
        try:
            scheme = image.url[:8].lower()
            if scheme.startswith("data:"):
                data = await run_by_size(_read_data_uri, image.url)
            elif scheme.startswith(("http://", "https://")):
                if not self._limits.allow_remote_images:
                    raise invalid_url(
                        "this server does not fetch images; send the file as "
                        "data:image/png;base64,..."
                    )
                with self._inflight.count() as add:
                    data = await fetch_image(image.url, self._limits, self._network, add)
                    return await self.decoder.decode(data, budget, policy)
            else:
                raise invalid_url(
                    "images must be data:image/...;base64,... (or https:// URLs, if this server "
                    "fetches them); files are not opened"
                )
            return await self.decoder.decode(data, budget, policy)
        except ApiError as error:
            error.param = "messages.{}.content.{}.image_url.url".format(*indices)
            raise


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
