"""The process that decoders of images are forked from: `python owl2/serve/decode_forkserver.py FD`.

::

    server ──a socket for one image──► nursery ──fork──► decoder: RGB image, or what is wrong

It imports once and never computes, so that a fork is safe and takes milliseconds. Each image gets
a process of its own, which has nothing of other requests in it, may use so much memory and time,
and can open neither files nor connections: whatever an image does to Pillow ends with it.

A job on its socket: the length of a JSON header, the header (`Job`), the image's file. The reply:
`IMAGE`, `BROKEN` or `HUGE`, a length, and RGB bytes or a sentence in UTF-8. Nothing is pickled,
as the decoder may be under a stranger's command.
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
    import resource  # Windows has none, and says so in `decoding`

if __name__ == "__main__":
    # What `import owl2` brings along takes seconds and hundreds of megabytes, torch and
    # transformers; here the package is only where its modules are.
    sys.modules["owl2"] = ModuleType("owl2")
    sys.modules["owl2"].__path__ = [str(Path(__file__).parents[1])]

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import load_image
from owl2.processing.image_processing import ImagePolicy, Owl2ImageProcessor

IMAGE, BROKEN, HUGE = b"P", b"B", b"H"
LENGTH = struct.Struct("!I")
CALL = b"j"  # comes with a job's socket
READY = b"."


@dataclass(frozen=True)
class Job:
    """What is wanted of an image whose file has `length` bytes.

    Attributes:
        size: edge of the square that the model sees, in pixels; so many RGB pixels come back.
        policy: see `Owl2ImageProcessor`, as for `mean`.
        max_pixels: of the image.
        memory: bytes, beside what the process has.
        seconds: from its beginning; then the process is gone.
    """

    length: int
    size: int
    policy: ImagePolicy
    mean: tuple[float, ...]
    max_pixels: int
    memory: int
    seconds: float

    def pack(self) -> bytes:
        """The head of the message."""
        header = json.dumps(asdict(self)).encode()
        return LENGTH.pack(len(header)) + header


def receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: there are fewer.
    """
    parts = []
    while length:
        part = connection.recv(min(length, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def main(control: socket.socket) -> None:
    """Fork a decoder for each socket that comes, until the server is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets those that have ended
    Image.init()  # or each decoder would import the formats
    gc.collect()
    gc.freeze()
    with suppress(ConnectionError):  # the server has ended before it asked for anything
        control.sendall(READY)
        while _fork_one(control):
            pass


def _fork_one(control: socket.socket) -> bool:
    """Wait for a job's socket; False: the server is gone."""
    call, sockets, _, _ = socket.recv_fds(control, len(CALL), 1)
    if not call:
        return False
    if os.fork() == 0:
        control.close()
        _decode_and_end(socket.socket(fileno=sockets[0]))
    os.close(sockets[0])
    return True


def _decode_and_end(connection: socket.socket) -> NoReturn:
    # Not through the interpreter's end: that is the nursery's.
    code = 1
    try:
        job = Job(**json.loads(receive(connection, LENGTH.unpack(receive(connection, 4))[0])))
        _confine(job)
        status, reply = _decode(job, receive(connection, job.length))
        connection.sendall(status + LENGTH.pack(len(reply)) + reply)
        code = 0
    finally:
        os._exit(code)


def _confine(job: Job) -> None:
    signal.setitimer(signal.ITIMER_REAL, job.seconds)  # its signal ends the process
    with suppress(OSError):  # no such file outside Linux: if memory is short, this one goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    # What decoders complain of is said in the reply; clients are not to fill the log.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_AS: _own_size() + job.memory,
    }
    if sys.platform != "linux":
        del limits[resource.RLIMIT_AS]  # macOS refuses it
    for what, limit in limits.items():
        resource.setrlimit(what, (limit, limit))


def _own_size() -> int:
    """Bytes of this process's address space; 0 where the system does not tell."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return pages * mmap.PAGESIZE
    return 0


def _decode(job: Job, data: bytes) -> tuple[bytes, bytes]:
    try:
        processor = Owl2ImageProcessor(
            job.size, job.policy, job.mean, (1.0, 1.0, 1.0), max_pixels=job.max_pixels
        )
        image = processor.to_square(load_image(data, job.max_pixels))
        return IMAGE, image.tobytes()
    except (InputError, MemoryError) as error:
        if _is_of_memory(error):
            return HUGE, b"The image takes too much memory to decode: make it smaller."
        is_huge = isinstance(error, InputError) and error.code == ErrorCode.IMAGE_TOO_LARGE
        return HUGE if is_huge else BROKEN, str(error).encode("utf-8", "backslashreplace")


def _is_of_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__
    return error is not None


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
