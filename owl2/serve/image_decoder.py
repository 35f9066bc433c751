"""Image files ──► small RGB images, decoded in separate processes.

Image decoders are C code that processes untrusted bytes. If one crashes, hangs or exhausts its
memory, only its own request fails, with status 400. `decode_forkserver` starts the processes.
"""

import asyncio
import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve import decode_forkserver
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError

START_SECONDS = 120  # imports are slow on a busy machine
GRACE_SECONDS = 5.0  # until a decoder that has not ended itself counts as stuck
MAX_MESSAGE_BYTES = 10_000
CODES = {decode_forkserver.INVALID: "invalid_image", decode_forkserver.TOO_LARGE: "image_too_large"}

# The environment of decoders: what Python needs to start, and no secrets.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONHOME")
_SET = {
    "OMP_NUM_THREADS": "1",  # a process must have no threads when it is forked
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


class SandboxedImageDecoder:
    """Decodes images in separate processes, `image_decoders` at a time.

    Args:
        processor: The decoded squares have its size and policy; it makes the same pixel values of
            them as of the files.

    Raises:
        InputError: The system cannot start such processes, or `max_pixels` of the processor is
            smaller than its squares.
    """

    def __init__(self, limits: ServerLimits, processor: Owl2ImageProcessor) -> None:
        if not hasattr(socket, "send_fds"):
            raise InputError(
                "Images are decoded in processes that this system cannot start: run the server on "
                "Linux, macOS or WSL.",
                ErrorCode.UNSUPPORTED,
            )
        if processor.size**2 > processor.max_pixels:
            raise InputError(
                f"max_pixels is {processor.max_pixels:,}, but the model's images have "
                f"{processor.size}×{processor.size} pixels: raise max_pixels.",
                ErrorCode.INVALID_VALUE,
            )
        self._limits = limits
        self._processor = processor
        self._max_pixels = min(limits.max_image_pixels, processor.max_pixels)
        self._pool = ThreadPoolExecutor(limits.image_decoders, "owl2-image")

    def start(self) -> None:
        """Start the fork server, so that the first image does not wait for it."""
        fork_server().start()

    def close(self) -> None:
        """Accept no more images; does not wait for the current ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def decode(self, data: bytes) -> Image.Image:
        """`decode_sync` in a thread, after a check of the file size.

        Raises:
            ApiError: 400.
        """
        limit = self._limits.max_image_bytes
        if len(data) > limit:
            raise ApiError(
                400,
                f"The image has {len(data):,} bytes; the limit of this server is {limit:,}.",
                code="image_too_large",
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self.decode_sync, data)

    def decode_sync(self, data: bytes) -> Image.Image:
        """An image file → the (size, size) RGB image that the model sees.

        Raises:
            ApiError: 400: not an image, corrupt, too large, or its decoder exceeded the limits on
                memory or time or crashed.
        """
        timeout = self._limits.image_decode_timeout
        size = self._processor.size
        request = decode_forkserver.DecodeRequest(
            length=len(data),
            size=size,
            policy=self._processor.policy,
            mean=self._processor.image_mean,
            max_pixels=self._max_pixels,
            memory=self._limits.image_decode_memory,
            timeout=timeout,
        )
        with fork_server().fork() as connection:
            start = time.monotonic()
            connection.settimeout(timeout + GRACE_SECONDS)
            try:
                connection.sendall(request.pack() + data)
                status = decode_forkserver.receive_exactly(connection, 1)
                header = decode_forkserver.receive_exactly(connection, 4)
                [length] = decode_forkserver.LENGTH.unpack(header)
                is_image = status == decode_forkserver.DECODED
                if length != 3 * size**2 if is_image else length >= MAX_MESSAGE_BYTES:
                    raise EOFError(f"a reply of {length} bytes")
                reply = decode_forkserver.receive_exactly(connection, length)
            except (EOFError, OSError) as error:
                if time.monotonic() - start >= timeout:
                    raise ApiError(
                        400,
                        f"The image takes longer than {timeout:g} seconds to decode. Reduce its "
                        "size.",
                        code="image_too_large",
                    ) from error
                raise ApiError(
                    400,
                    "The image cannot be decoded: its decoder crashed. The file may be corrupt or "
                    "malicious; save it again as PNG.",
                    code="invalid_image",
                ) from error
        if not is_image:
            code = CODES.get(status, "invalid_image")
            raise ApiError(400, reply.decode("utf-8", "replace"), code=code)
        return Image.frombytes("RGB", (size, size), reply)


class ForkServer:
    """The process that decoders are forked from; it is restarted if it has ended.

    Attributes:
        pid: Of the process; None before the first start.
    """

    def __init__(self) -> None:
        self.pid: int | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False

    def start(self) -> None:
        """Start the process unless it runs; does not wait for it."""
        with self._lock:
            self._start()

    def fork(self) -> socket.socket:
        """A socket that is connected to a new decoder."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            for is_last_attempt in (False, True):
                control = self._start()
                try:
                    if not self._is_ready and not control.recv(1):
                        raise ConnectionError("the fork server of image decoders did not start")
                    self._is_ready = True
                    socket.send_fds(control, [decode_forkserver.FORK], [theirs.fileno()])
                    break
                except OSError:
                    self._stop()
                    if is_last_attempt:
                        ours.close()
                        raise
        return ours

    def close(self) -> int | None:
        """End the process by closing its connection; its exit code, None if it does not run."""
        with self._lock:
            if self._control is None or self._process is None:
                return None
            self._control.close()
            self._control = None
            return self._process.wait(START_SECONDS)

    def kill(self) -> None:
        """Kill the process."""
        with self._lock:
            self._stop()

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", decode_forkserver.__file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=decoder_environment(),
                start_new_session=True,  # Ctrl-C in a terminal must only reach the server
            )
        self.pid = self._process.pid
        ours.settimeout(START_SECONDS)
        self._control, self._is_ready = ours, False
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@cache
def fork_server() -> ForkServer:
    """The fork server of this process. It has no settings; each request brings its own."""
    server = ForkServer()
    atexit.register(server.kill)
    return server


def decoder_environment() -> dict[str, str]:
    """The environment variables of decoders."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return kept | _SET | {"PYTHONPATH": path}
