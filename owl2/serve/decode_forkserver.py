"""The fork server of image decoders: `python owl2/serve/decode_forkserver.py FD`.

::

    server ──a socket per image──► fork server ──fork──► decoder: RGB image, or an error

The fork server only imports modules, so that a fork is safe and takes milliseconds. Each image is
decoded in its own process, which contains no data of other requests, has limits on memory and time,
and can open neither files nor connections. An attack on Pillow ends with that process.

The socket of an image carries the length of a JSON header, the header (`DecodeRequest`) and the
file. The reply is a status (`DECODED`, `INVALID` or `TOO_LARGE`), a length, and RGB values or an
error message in UTF-8. Nothing is pickled, because an attacker may control the decoder.
"""

import gc
import json
import mmap
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from PIL import Image

if sys.platform != "win32":
    import resource  # does not exist on Windows, which `image_decoder` rejects

if __name__ == "__main__":
    # `import owl2` would import torch and transformers: seconds, and hundreds of megabytes. An
    # empty package with the same path gives access to the modules that are needed.
    sys.modules["owl2"] = ModuleType("owl2")
    sys.modules["owl2"].__path__ = [str(Path(__file__).parents[1])]

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import load_image
from owl2.processing.image_processing import ImagePolicy, Owl2ImageProcessor

DECODED, INVALID, TOO_LARGE = b"D", b"I", b"L"
LENGTH = struct.Struct("!I")
FORK = b"f"  # sent with the socket of an image
READY = b"."


@dataclass(frozen=True)
class DecodeRequest:
    """How to decode a file.

    Attributes:
        length: Bytes of the file.
        size: Edge of the square that the model sees, in pixels; the reply has this size.
        policy, mean: As in `Owl2ImageProcessor`.
        max_pixels: Of the image.
        memory: Bytes that the decoder may allocate.
        timeout: Seconds until the process is ended.
    """

    length: int
    size: int
    policy: ImagePolicy
    mean: tuple[float, ...]
    max_pixels: int
    memory: int
    timeout: float

    def pack(self) -> bytes:
        """The header with its length."""
        header = json.dumps(asdict(self)).encode()
        return LENGTH.pack(len(header)) + header


def receive_exactly(connection: socket.socket, length: int) -> bytes:
    """Receive `length` bytes.

    Raises:
        EOFError: The connection was closed before.
    """
    chunks = []
    while length:
        chunk = connection.recv(min(length, 2**20))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def receive_sized(connection: socket.socket) -> bytes:
    """Receive a length and as many bytes. Raises EOFError."""
    [length] = LENGTH.unpack(receive_exactly(connection, LENGTH.size))
    return receive_exactly(connection, length)


def main(control: socket.socket) -> None:
    """Fork a decoder for each socket that arrives, until the server closes the connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended decoders
    Image.init()  # otherwise every decoder would import the formats
    gc.collect()
    gc.freeze()
    with suppress(ConnectionError):  # the server has ended already
        control.sendall(READY)
        while True:
            message, sockets, _, _ = socket.recv_fds(control, len(FORK), 1)
            if not message:
                break
            if os.fork() == 0:
                control.close()
                _run_decoder(socket.socket(fileno=sockets[0]))
            os.close(sockets[0])


def _run_decoder(connection: socket.socket) -> NoReturn:
    exit_code = 1
    try:
        request = DecodeRequest(**json.loads(receive_sized(connection)))
        _restrict_process(request)
        status, reply = _decode(request, receive_exactly(connection, request.length))
        connection.sendall(status + LENGTH.pack(len(reply)) + reply)
        exit_code = 0
    finally:
        os._exit(exit_code)  # without the clean-up of the fork server's interpreter


def _restrict_process(request: DecodeRequest) -> None:
    signal.setitimer(signal.ITIMER_REAL, request.timeout)  # its signal ends the process
    with suppress(OSError):  # only on Linux: the first process to be killed if memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Decoders print warnings; clients must not be able to fill the log.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_AS: _address_space() + request.memory,
    }
    if sys.platform != "linux":
        del limits[resource.RLIMIT_AS]  # macOS does not support it
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _address_space() -> int:
    """Bytes of this process's address space; 0 where /proc does not exist."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    return 0


def _decode(request: DecodeRequest, data: bytes) -> tuple[bytes, bytes]:
    try:
        processor = Owl2ImageProcessor(
            request.size,
            request.policy,
            request.mean,
            (1.0, 1.0, 1.0),
            max_pixels=request.max_pixels,
        )
        image = processor.to_square(load_image(data, request.max_pixels))
        return DECODED, image.tobytes()
    except (InputError, MemoryError) as error:
        code = error.code if isinstance(error, InputError) else ErrorCode.OUT_OF_MEMORY
        if code == ErrorCode.OUT_OF_MEMORY:
            return TOO_LARGE, b"The image needs too much memory to decode. Reduce its size."
        status = TOO_LARGE if code == ErrorCode.IMAGE_TOO_LARGE else INVALID
        return status, str(error).encode("utf-8", "backslashreplace")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
