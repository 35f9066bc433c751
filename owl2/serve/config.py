"""Settings of a server. Each field is an option of `owl2 serve` and `owl2 web`."""

import math
import os
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from owl2.constants import MAX_NUM_FRAMES
from owl2.errors import ErrorCode, InputError

MIB = 2**20
MAX_N = 128  # answers that the engine computes together
MAX_TOKENS = 1_000_000  # more than any context


def _option(default: Any, help: str, low: float | None = None, high: float = math.inf) -> Any:
    """A field whose metadata has the help text and, for numbers, the range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits of a server; sizes are in bytes and times in seconds.

    docs/reference/server-options.md lists the error of a request beyond each limit.

    Raises:
        InputError: A value is out of its range.
    """

    # All requests together
    max_num_seqs: int = _option(64, "Requests that the engine processes at the same time.", 1)
    max_queued: int = _option(256, "Requests that wait for the engine.", 0)
    max_inflight_bytes: int = _option(
        1024 * MIB, "Total size of the bodies and fetched files of all unfinished requests.", 1
    )
    max_idle_connections: int = _option(1024, "Connections without a request.", 1)
    image_decoders: int = _option(2, "Images and videos that are decoded at the same time.", 1)
    # One request
    request_timeout: float = _option(
        600.0, "Time from the arrival of a request to its last token.", 0
    )
    max_body_bytes: int = _option(
        32 * MIB, "Size of a request body; base64 adds a third to images.", 1
    )
    body_timeout: float = _option(60.0, "Time until the complete body has arrived.", 0)
    max_messages: int = _option(256, "Messages of a conversation.", 1)
    max_n: int = _option(8, "Number of answers to one request (n).", 1, MAX_N)
    max_completion_tokens: int = _option(2048, "Maximum tokens of one answer.", 1, MAX_TOKENS)
    # Images of a request
    max_images: int = _option(8, "Images of a conversation.", 0)
    max_image_bytes: int = _option(16 * MIB, "Size of an image file.", 1)
    max_image_pixels: int = _option(2**25, "Pixels of an image.", 1)
    max_request_pixels: int = _option(
        2**28,
        "Pixels of all images and frames of a request, each as a square of its longer edge.",
        1,
    )
    image_decode_timeout: float = _option(
        20.0, "Time to decode the images and videos of a request.", 0
    )
    image_decode_memory: int = _option(1024 * MIB, "Memory to decode one image or video.", 64 * MIB)
    allow_remote_images: bool = _option(False, "Fetch images and videos from http and https URLs.")
    image_fetch_timeout: float = _option(10.0, "Time to fetch one image or video from a URL.", 0)
    max_image_redirects: int = _option(3, "Redirects that are followed for one image.", 0)
    # Videos of a request
    max_videos: int = _option(4, "Videos of a conversation.", 0)
    num_frames: int | None = _option(
        None,
        "Frames of a video that the model sees; default: of the checkpoint.",
        1,
        MAX_NUM_FRAMES,
    )
    max_video_bytes: int = _option(32 * MIB, "Size of a video file.", 1)
    max_video_seconds: float = _option(600.0, "Duration of a video.", 0)
    max_video_frames: int = _option(36_000, "Frames of a video file.", 1)
    # Uploads of the web page
    max_upload_bytes: int = _option(4096 * MIB, "Total size of all uploads to the page.", 0)
    max_client_upload_bytes: int = _option(
        512 * MIB, "Total size of the uploads from one address.", 0
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            low, high = setting.metadata["low"], setting.metadata["high"]
            is_time = isinstance(setting.default, float)
            if (
                value is None
                or low is None
                or (low <= value <= high and (not is_time or 0 < value < math.inf))
            ):
                continue
            expected = f"from {low} to {high}" if high < math.inf else f"{low} or more"
            expected = "above 0" if is_time else expected
            raise InputError(
                f"{setting.name} is {value}; it must be {expected}.", ErrorCode.INVALID_VALUE
            )

    @property
    def max_upload_file_bytes(self) -> int:
        """Size of an image or a video that is uploaded to the page."""
        return max(self.max_image_bytes, self.max_video_bytes if self.max_videos else 0)

    def with_frames(self, num_frames: int) -> Self:
        """The limits with a default of `num_frames`."""
        return replace(self, num_frames=self.num_frames or num_frames)


@dataclass(frozen=True, kw_only=True)
class ServerConfig(ServerLimits):
    """Configuration of `owl2 serve` and `owl2 web`."""

    model: str = _option(MISSING, "Checkpoint: a directory or a hub id.")
    host: str = _option("127.0.0.1", "Listen address; 0.0.0.0 accepts other machines.")
    port: int = _option(8000, "Port; 0 selects a free one.", 0, 65535)
    served_model_name: str | None = _option(
        None, "Name of the model in the API; by default the directory's name or the hub id."
    )
    lora_modules: list[str] | None = _option(  # noqa: RUF009  # the default is not a list
        None,
        "NAME=ADAPTER: also serve a LoRA adapter, a directory or a hub id. Requests select it with "
        "its name as the model. Repeatable.",
    )
    api_key_env: str | None = _option(
        None, "Environment variable with API keys, separated by commas."
    )
    api_key_file: str | None = _option(None, "File with API keys, one per line.")
    allowed_hosts: str | None = _option(
        None,
        "Host names of requests, separated by commas, such as example.com or *.example.com; "
        "default: localhost if --host is a loopback address, otherwise all.",
    )
    allowed_origins: str | None = _option(
        None,
        "Other websites whose pages may send requests, separated by commas, such as "
        "https://example.com; * for all.",
    )
    web: bool = _option(False, "Also serve the web page, at /web.")
    examples: str | None = _option(
        None, 'Example questions of the page: JSON, [{"question": TEXT, "image": FILE}, ...].'
    )
    base: str | None = _option(
        None, "Base model of an adapter; default: the one that the adapter names."
    )
    anchors: str | None = _option(
        None, "Folder with the five anchor images of Compare2Score, in the order of their names."
    )
    device: str | None = _option(None, "cuda, mps or cpu; default: the first available.")
    dtype: str | None = _option(
        None, "float32, bfloat16 or float16; default: the best for the device."
    )
    quantize: str | None = _option(None, "8bit or 4bit: quantize the weights of the decoder.")
    activation_bits: int = _option(
        16, "16 or 8: bits of the inputs of quantized layers on a CPU.", 8, 16
    )
    max_num_batched_tokens: int | None = _option(
        None,
        "Tokens that the engine computes in a step; default: 256 on a CPU, 2048 on a GPU and for "
        "tiny models.",
        1,
    )
    shutdown_timeout: float = _option(  # an int as default: 0 and infinity are valid
        30, "Seconds for unfinished requests after SIGTERM or Ctrl-C.", 0
    )

    @property
    def model_name(self) -> str:
        """The name of the model in the API."""
        path = Path(self.model)
        default = path.resolve().name if path.is_dir() else self.model
        return self.served_model_name or default

    @property
    def adapters(self) -> dict[str, str]:
        """The directories or hub ids of adapters by their names in the API.

        Raises:
            InputError: Not NAME=ADAPTER, or a name occurs twice or is that of the model.
        """
        adapters: dict[str, str] = {}
        for module in self.lora_modules or ():
            name, _, path = module.partition("=")
            if not name or not path:
                raise InputError(
                    f"lora_modules is {module!r}; it must be NAME=ADAPTER.",
                    ErrorCode.INVALID_VALUE,
                )
            if name in (*adapters, self.model_name):
                raise InputError(
                    f"lora_modules: two models have the name {name!r}.", ErrorCode.CONFLICT
                )
            adapters[name] = os.path.expanduser(path)
        return adapters
