"""Images' files → small RGB images, decoded in processes of their own.

A decoder is C code on a stranger's bytes. Here it can crash, hang or fill memory, and the request
gets a 400 and no other one notices (`nursery` says how the processes come about).
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from functools import cache

from PIL import Image

from owl2.errors import InputError
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve import decode_forkserver
from owl2.serve.errors import ApiError
from owl2.serve.limits import Limits

START_SECONDS = 120  # importing takes some, on a busy machine more
GRACE_SECONDS = 5.0  # after which a decoder that did not end itself is taken to be stuck
LONGEST = 10_000  # bytes of a sentence that says what is wrong
CODES = {decode_forkserver.BROKEN: "invalid_image", decode_forkserver.HUGE: "image_too_large"}

# A decoder's environment: what Python needs to start, and no secrets.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONHOME")
_SET = {
    "OMP_NUM_THREADS": "1",  # a process that is forked must have no threads
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


class Decoders:
    """Decodes as many images at a time as threads call it.

    Args:
        like: whose square images are wanted; given one of them, it gives the pixels that it
            gives for the file.

    Raises:
        InputError: a system without what this needs; `like` refuses its own squares.
    """

    def __init__(self, limits: Limits, like: Owl2ImageProcessor) -> None:
        if not hasattr(socket, "send_fds"):
            raise InputError(
                "Images are decoded in processes that this system cannot make: run the server on "
                "Linux or macOS, or in WSL."
            )
        if like.size**2 > like.max_pixels:
            raise InputError(
                f"max_pixels is {like.max_pixels:,}, fewer than the {like.size}×{like.size} pixels "
                "that the model sees: raise it."
            )
        self._limits = limits
        self._like = like
        self._max_pixels = min(limits.pixels, like.max_pixels)

    def start(self) -> None:
        """Begin what takes seconds: the first image will not wait for it."""
        _nursery().start()

    def decode(self, data: bytes) -> Image.Image:
        """An image's file → the (size, size) RGB image that the model sees.

        Raises:
            ApiError: 400: no image, a broken or a huge one, one that takes too much memory or
                time, or that ended its decoder.
        """
        limits = self._limits
        size = self._like.size
        job = decode_forkserver.Job(
            length=len(data),
            size=size,
            policy=self._like.policy,
            mean=self._like.image_mean,
            max_pixels=self._max_pixels,
            memory=limits.image_memory,
            seconds=limits.image_seconds,
        )
        with _nursery().open() as connection:
            begin = time.monotonic()
            connection.settimeout(limits.image_seconds + GRACE_SECONDS)
            try:
                connection.sendall(job.pack() + data)
                status = decode_forkserver.receive(connection, 1)
                [length] = decode_forkserver.LENGTH.unpack(decode_forkserver.receive(connection, 4))
                fits = (
                    length == 3 * size * size
                    if status == decode_forkserver.IMAGE
                    else length < LONGEST
                )
                if not fits:
                    raise EOFError(f"a reply of {length} bytes")
                reply = decode_forkserver.receive(connection, length)
            except (EOFError, OSError) as error:
                slow = time.monotonic() - begin >= limits.image_seconds
                raise _gave_up(limits.image_seconds if slow else None) from error
        if status != decode_forkserver.IMAGE:
            code = CODES.get(status, CODES[decode_forkserver.BROKEN])
            raise ApiError(400, reply.decode("utf-8", "replace"), code=code)
        return Image.frombytes("RGB", (size, size), reply)


def _gave_up(seconds: float | None) -> ApiError:
    """`seconds`: that it had, if that was the reason."""
    if seconds is not None:
        message = f"The image takes longer than {seconds:g} seconds to decode: make it smaller."
        return ApiError(400, message, code=CODES[decode_forkserver.HUGE])
    message = (
        "The image cannot be decoded: the process that tried it ended. It may be broken, or made "
        "to do harm; save it anew, as PNG."
    )
    return ApiError(400, message, code=CODES[decode_forkserver.BROKEN])


class Nursery:
    """The process that decoders are forked from; begun anew where it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False

    def start(self) -> None:
        """Begin it, unless it runs; without waiting for it."""
        with self._lock:
            self._start()

    def open(self) -> socket.socket:
        """A socket with a new decoder at its other end."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            for again in (True, False):
                control = self._start()
                try:
                    self._wait(control)
                    socket.send_fds(control, [decode_forkserver.CALL], [theirs.fileno()])
                    break
                except OSError:
                    self._end()
                    if not again:
                        ours.close()
                        raise
        return ours

    def close(self) -> None:
        """End it."""
        with self._lock:
            self._end()

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
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a terminal is the server's business
            )
        ours.settimeout(START_SECONDS)
        self._control, self._ready = ours, False
        return ours

    def _wait(self, control: socket.socket) -> None:
        if not self._ready and not control.recv(1):
            raise ConnectionError("the process that decodes images did not start")
        self._ready = True

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@cache
def _nursery() -> Nursery:
    """The process's one: it knows no settings, those are sent with each image."""
    process = Nursery()
    atexit.register(process.close)
    return process


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
    return kept | _SET | {"PYTHONPATH": path}
