"""Settings of a server. The command line reads its options from `ServerLimits`."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from owl2.errors import ErrorCode, InputError

MIB = 2**20
MAX_N = 128  # answers that the engine computes together
MAX_TOKENS = 1_000_000  # more than any context


def _limit(default: Any, help: str, low: float = 1, high: float = math.inf) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server; sizes are in bytes and times in seconds.

    Each field is an option of `owl2 serve` and `owl2 web`; its metadata has the help text and the
    range. docs/serving.md lists the status and the error code of a request beyond each limit.

    Raises:
        InputError: A value is out of its range.
    """

    # All requests together
    max_num_seqs: int = _limit(64, "Requests that the engine processes at the same time.")
    max_queued: int = _limit(256, "Requests that wait for the engine.", 0)
    max_inflight_bytes: int = _limit(1024 * MIB, "Total body size of all unfinished requests.")
    image_decoders: int = _limit(2, "Images that are decoded at the same time.")
    # One request
    request_timeout: float = _limit(600.0, "From the arrival to the last token.", 0)
    max_body_bytes: int = _limit(32 * MIB, "Size of a request body; base64 adds a third to images.")
    body_timeout: float = _limit(60.0, "Until the whole body of a request has arrived.", 0)
    max_messages: int = _limit(256, "Messages of a conversation.")
    max_n: int = _limit(8, "Answers to one request (n).", 1, MAX_N)
    max_completion_tokens: int = _limit(2048, "Tokens of one answer.", 1, MAX_TOKENS)
    # Images of a request
    max_images: int = _limit(8, "Images of a conversation.", 0)
    max_image_bytes: int = _limit(16 * MIB, "Size of an image file.")
    max_image_pixels: int = _limit(2**25, "Pixels of an image.")
    image_decode_timeout: float = _limit(20.0, "To decode one image.", 0)
    image_decode_memory: int = _limit(1024 * MIB, "Memory to decode one image.", 64 * MIB)
    allow_remote_images: bool = _limit(False, "Fetch images from http and https URLs.", 0)
    image_fetch_timeout: float = _limit(10.0, "To fetch one image from a URL.", 0)
    max_image_redirects: int = _limit(3, "Redirects that are followed for one image.", 0)

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            low, high = limit.metadata["low"], limit.metadata["high"]
            is_time = isinstance(limit.default, float)
            if not low <= value <= high or (is_time and not 0 < value < math.inf):
                expected = "above 0" if is_time else f"{low} or more"
                if high < math.inf:
                    expected = f"from {low} to {high}"
                raise InputError(
                    f"{limit.name} is {value}; it must be {expected}.", ErrorCode.INVALID_VALUE
                )


@dataclass(frozen=True)
class ServerConfig:
    """What `owl2 serve` and `owl2 web` start.

    Attributes:
        model: Checkpoint: a directory or a hub id.
        served_model_name: Name of the model in the API; default: the name of the directory, or the
            hub id.
        api_key_env, api_key_file: Where the API keys are read from; at most one of the two. Without
            keys, every client is accepted.
        device, dtype, quantize: As in `Engine.from_pretrained`.
        shutdown_timeout: Seconds for unfinished requests after a signal.
        web: Also serve the web page.
        examples: A file with the questions that the web page offers.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key_env: str | None = None
    api_key_file: Path | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    limits: ServerLimits = ServerLimits()
    shutdown_timeout: float = 30.0
    web: bool = False
    examples: Path | None = None

    @property
    def model_name(self) -> str:
        """The name of the model in the API."""
        path = Path(self.model)
        default = path.resolve().name if path.is_dir() else self.model
        return self.served_model_name or default
