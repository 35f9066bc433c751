"""The fork server of image and video decoders: `python owl2/serve/decode_forkserver.py FD`.

::

    server ──a socket per file──► fork server ──fork──► decoder: RGB images, or an error

The fork server only imports modules, so that a fork is safe and takes milliseconds. Each file is
decoded in its own process, which contains no data of other requests, has limits on memory and time,
and can open neither files nor connections. An attack on Pillow or FFmpeg ends with that process.

The socket of a file carries a line of JSON (`DecodeRequest`) and the file. The reply is a line
with a status and the cost of the images, then RGB values or an error message in UTF-8. Nothing is
pickled, because an attacker may control the decoder.
"""

import gc
import json
import math
import mmap
import os
import pkgutil
import resource
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from PIL import Image, ImageCms  # noqa: F401  # Pillow imports it for LAB; a decoder cannot

if __name__ == "__main__":
    # `import owl2` would import torch and transformers: seconds, and hundreds of megabytes. An
    # empty package with the same path gives access to the modules that are needed.
    sys.modules["owl2"] = ModuleType("owl2")
    sys.modules["owl2"].__path__ = [str(Path(__file__).parents[1])]

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import ImagePolicy, check_size, image_cost, load_image
from owl2.processing.image_square import to_square
from owl2.processing.video import VideoLimits, load_video

# Statuses; those of errors are codes of the API.
DECODED, INVALID, TOO_LARGE = "decoded", "invalid_image", "image_too_large"
EXPENSIVE = "expensive"  # not decoded, because its cost is above `max_cost`
FORK = b"f"  # sent with the socket of an image
READY = b"."  # from the fork server when it has imported the modules for images


@dataclass(frozen=True)
class DecodeRequest:
    """How to decode a file.

    Attributes:
        size: Edge of the square that the model sees, in pixels; the reply has this size. None: the
            complete image, for models that cut it into crops.
        policy, mean: As in `to_square`.
        max_pixels: Of the image.
        memory: Bytes that the decoder may allocate.
        timeout: Seconds until the process is ended.
        max_cost: Of an image that is decoded, as from `image_cost`; None: any.
        num_frames: Of a video; None: the file is an image.
        max_seconds, max_frames: Of a video, see `VideoLimits`.
    """

    size: int | None
    policy: ImagePolicy
    mean: tuple[float, ...]
    max_pixels: int
    memory: int
    timeout: float
    max_cost: int | None = None
    num_frames: int | None = None
    max_seconds: float = math.inf
    max_frames: float = math.inf


def main(control: socket.socket) -> None:
    """Fork a decoder for each socket that arrives, until the server closes the connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended decoders
    Image.init()  # otherwise every decoder would import the formats
    with suppress(ConnectionError):  # the server has ended already
        control.sendall(READY)
        _import_av()
        gc.collect()
        gc.freeze()
        while True:
            message, sockets, _, _ = socket.recv_fds(control, len(FORK), 1)
            if not message:
                break
            if os.fork() == 0:
                control.close()
                _run_decoder(socket.socket(fileno=sockets[0]))
            os.close(sockets[0])


def _import_av() -> None:
    """Import all modules of `av` if it is installed; it imports some of them when it decodes."""
    with suppress(ImportError):
        for module in pkgutil.walk_packages(import_module("av").__path__, "av."):
            if not module.name.endswith("__main__"):
                import_module(module.name)


def _run_decoder(connection: socket.socket) -> NoReturn:
    exit_code = 1
    try:
        stream = connection.makefile("rwb")
        request = DecodeRequest(**json.loads(stream.readline()))
        restrict_process(request)
        status, cost, reply = _decode(request, stream.read())
        stream.write(f"{status} {cost}\n".encode() + reply)
        stream.flush()
        connection.shutdown(socket.SHUT_WR)  # the end of the process takes longer
        exit_code = 0
    finally:
        os._exit(exit_code)  # without the clean-up of the fork server's interpreter


def restrict_process(request: DecodeRequest) -> None:
    """Limit the time and memory of this process; it cannot open files or connections afterwards."""
    signal.setitimer(signal.ITIMER_REAL, request.timeout)  # its signal ends the process
    address_space = 0
    with suppress(OSError):  # /proc exists only on Linux
        # The first process to be killed if memory runs out.
        Path("/proc/self/oom_score_adj").write_text("1000")
        address_space = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    # Decoders print warnings; clients must not be able to fill the log.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_AS: address_space + request.memory,
    }
    if sys.platform != "linux":
        del limits[resource.RLIMIT_AS]  # macOS does not support it
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _decode(request: DecodeRequest, data: bytes) -> tuple[str, int, bytes]:
    """The status, the cost, and the RGB values of all images or the message of the reply.

    The values of a complete image follow a line with its width and height.
    """
    cost = 0
    try:
        if request.num_frames is not None:
            limits = VideoLimits(request.max_pixels, request.max_seconds, request.max_frames)
            images = load_video(data, request.num_frames, limits=limits)
            sizes = [(*image.size, request.max_pixels, "the frame") for image in images]
            cost = sum(check_size(*size) for size in sizes)
        else:
            cost = image_cost(data, request.max_pixels)
            if request.max_cost is not None and cost > request.max_cost:
                return EXPENSIVE, cost, b""
            images = [load_image(data, request.max_pixels)]
        return DECODED, cost, b"".join(_pixels(image, request) for image in images)
    except (InputError, MemoryError) as error:
        code = error.code if isinstance(error, InputError) else ErrorCode.OUT_OF_MEMORY
        if code == ErrorCode.OUT_OF_MEMORY:
            return TOO_LARGE, cost, b"The image needs too much memory to decode. Reduce its size."
        status = TOO_LARGE if code == ErrorCode.IMAGE_TOO_LARGE else INVALID
        return status, cost, str(error).encode("utf-8", "backslashreplace")


def _pixels(image: Image.Image, request: DecodeRequest) -> bytes:
    if request.size is None:
        return f"{image.width} {image.height}\n".encode() + image.tobytes()
    return to_square(image, request.size, request.policy, request.mean).tobytes()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
