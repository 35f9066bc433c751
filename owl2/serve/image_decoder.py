"""Image and video files ──► small RGB images, decoded in separate processes.

Decoders are C code that processes untrusted bytes. If one crashes, hangs or exhausts its
memory, only its own request fails, with status 400. `decode_forkserver` starts the processes.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache

from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import ImagePolicy
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.video import DEFAULT_NUM_FRAMES
from owl2.serve import decode_forkserver
from owl2.serve.admission import current_client
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError, about_video
from owl2.serve.fair_slots import FairSlots, Owner, run_with_slots

# Images with a higher cost (see `image_cost`) are large: about 0.3 seconds. Photos of 12 megapixels
# are not.
LARGE_COST = 2**24
START_SECONDS = 120  # imports are slow on a busy machine
MAX_HEAD_BYTES = 200  # of a reply
GRACE_SECONDS = 5.0  # until a decoder that has not ended itself counts as stuck

# The environment of decoders: what Python needs to start, and no secrets.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONHOME")
_SET = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | dict.fromkeys(
    # A process must have no threads when it is forked.
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    "1",
)


@dataclass(eq=False)
class ImageBudget:
    """What the images of one request may still cost; also their owner in the queue of images.

    Attributes:
        client: The requests of clients are decoded in turn.
        cost: In pixels, see `image_cost`.
        seconds: To decode.
    """

    client: str
    cost: int
    seconds: float

    @classmethod
    def of_request(cls, limits: ServerLimits) -> "ImageBudget":
        """The budget of a request of `current_client`."""
        return cls(current_client.get(), limits.max_request_pixels, limits.image_decode_timeout)

    @property
    def owner(self) -> Owner:
        """The client and the request."""
        return self.client, id(self)


class SandboxedImageDecoder:
    """Decodes images in separate processes, `image_decoders` at a time.

    Requests take turns. Large images occupy all processes but one, so that small images do not
    wait for them.

    Args:
        processor: The decoded squares have its size and policy; it makes the same pixel values of
            them as of the files. It gets complete images if it cuts them into crops.

    Raises:
        InputError: `max_pixels` of the processor is smaller than its squares.
    """

    def __init__(self, limits: ServerLimits, processor: Owl2ImageProcessor) -> None:
        if processor.edge**2 > processor.max_pixels:
            raise InputError(
                f"max_pixels is {processor.max_pixels:,}, but the model's images have "
                f"{processor.edge}×{processor.edge} pixels: raise max_pixels.",
                ErrorCode.INVALID_VALUE,
            )
        self._limits = limits
        self._pool = ThreadPoolExecutor(limits.image_decoders, "owl2-image")
        # As many images again wait in the pool, so that its threads do not wait for the event loop.
        self._slots = FairSlots(2 * limits.image_decoders)
        self._large_slots = FairSlots(max(1, limits.image_decoders - 1))
        self._request = decode_forkserver.DecodeRequest(
            size=None if processor.makes_crops else processor.edge,
            policy=processor.image_policy,
            mean=tuple(processor.image_mean),
            max_pixels=min(limits.max_image_pixels, processor.max_pixels),
            memory=limits.image_decode_memory,
            timeout=limits.image_decode_timeout,
        )

    def start(self) -> None:
        """Start the fork server, so that the first image does not wait for it."""
        fork_server().start()

    def close(self) -> None:
        """Accept no more images; does not wait for the current ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def decode(
        self, data: bytes, budget: ImageBudget, policy: ImagePolicy | None = None
    ) -> Image.Image:
        """An image file → the (size, size) RGB image that the model sees, or the complete image.

        Args:
            budget: Of the request.
            policy: Instead of the image policy of the checkpoint.

        Raises:
            ApiError: 400: not an image, corrupt, too large for a limit or for the budget, or its
                decoder exceeded the limits on memory or time or crashed.
        """
        _check_bytes(data, self._limits.max_image_bytes)
        request = replace(self._request, policy=policy or self._request.policy)
        cost, images = await self._run(data, request, budget, [self._slots], LARGE_COST)
        _charge(budget, cost)
        if not images:
            slots = [self._large_slots, self._slots]
            _, images = await self._run(data, request, budget, slots)
        return images[0]

    async def decode_video(
        self, data: bytes, budget: ImageBudget, policy: ImagePolicy | None = None
    ) -> list[Image.Image]:
        """Frames of a video file, as `decode` returns images; `limits.num_frames` of them.

        A video occupies a process as a large image does.

        Raises:
            ApiError: 400, as `decode`.
        """
        limits = self._limits
        request = replace(
            self._request,
            policy=policy or self._request.policy,
            num_frames=limits.num_frames or DEFAULT_NUM_FRAMES,
            max_seconds=limits.max_video_seconds,
            max_frames=limits.max_video_frames,
        )
        try:
            _check_bytes(data, limits.max_video_bytes)
            slots = [self._large_slots, self._slots]
            cost, images = await self._run(data, request, budget, slots)
            _charge(budget, cost)
        except ApiError as error:
            raise about_video(error) from error
        return images

    async def _run(
        self,
        data: bytes,
        decode_request: decode_forkserver.DecodeRequest,
        budget: ImageBudget,
        slots: Sequence[FairSlots],
        max_cost: int | None = None,
    ) -> tuple[int, list[Image.Image]]:
        """`_decode` in a thread, with a slot of each of `slots`."""

        def work() -> tuple[int, list[Image.Image]]:
            if budget.seconds <= 0:
                raise self._too_slow()
            request = replace(decode_request, timeout=budget.seconds, max_cost=max_cost)
            return self._decode(data, request, budget)

        return await run_with_slots(slots, budget.owner, self._pool, work)

    def _decode(
        self, data: bytes, request: decode_forkserver.DecodeRequest, budget: ImageBudget
    ) -> tuple[int, list[Image.Image]]:
        """The cost of a file, and its images unless the cost is above `max_cost`."""
        num_pixels = request.max_pixels if request.size is None else request.size**2
        message = json.dumps(asdict(request)).encode() + b"\n" + data
        max_bytes = (request.num_frames or 1) * (3 * num_pixels + MAX_HEAD_BYTES)
        raw, seconds = fork_server().call(message, request.timeout, max_bytes)
        budget.seconds -= seconds
        first_line, _, reply = raw.partition(b"\n")
        head = first_line.decode("ascii", "replace").split()
        status, cost = head if len(head) == 2 and head[1].isdecimal() else ("", "0")
        if status == decode_forkserver.EXPENSIVE and request.max_cost is not None:
            return int(cost), []
        if status == decode_forkserver.DECODED and (images := _read_images(reply, request)):
            return int(cost), images
        if status in (decode_forkserver.INVALID, decode_forkserver.TOO_LARGE):
            raise ApiError(400, reply.decode("utf-8", "replace"), code=status)
        if seconds >= request.timeout:
            raise self._too_slow()
        raise ApiError(
            400,
            "The image cannot be decoded: its decoder crashed. The file may be corrupt or "
            "malicious; save it again as PNG.",
            code=decode_forkserver.INVALID,
        )

    def _too_slow(self) -> ApiError:
        return _too_large(
            f"The images of the request take longer than {self._limits.image_decode_timeout:g} "
            "seconds to decode. Reduce their size."
        )


def _read_images(reply: bytes, request: decode_forkserver.DecodeRequest) -> list[Image.Image]:
    """The images of a reply; none if it is incomplete or has sizes that are not allowed."""
    images, start = [], 0
    for _ in range(request.num_frames or 1):
        width = height = request.size or 0
        if request.size is None:
            end = reply.find(b"\n", start, start + MAX_HEAD_BYTES)
            size = reply[start : max(end, start)].decode("ascii", "replace").split()
            if len(size) != 2 or not all(part.isdecimal() and len(part) < 10 for part in size):
                return []
            width, height, start = int(size[0]), int(size[1]), end + 1
            if width * height > request.max_pixels:
                return []
        end = start + 3 * width * height
        if not start < end <= len(reply):
            return []
        images.append(Image.frombytes("RGB", (width, height), memoryview(reply)[start:end]))
        start = end
    return images if start == len(reply) else []


def _check_bytes(data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise _too_large(
            f"The image has {len(data):,} bytes; the limit of this server is {limit:,}."
        )


def _charge(budget: ImageBudget, cost: int) -> None:
    """Subtract the cost of an image or of all frames of a video."""
    if cost > budget.cost:
        raise _too_large(
            f"The images of the request have too many pixels: this one counts as {cost:,}, and "
            f"{budget.cost:,} remain. Reduce their size."
        )
    budget.cost -= cost


def _too_large(message: str) -> ApiError:
    return ApiError(400, message, code=decode_forkserver.TOO_LARGE)


class ForkServer:
    """The process that decoders are forked from; it is restarted if it has ended.

    Attributes:
        process: None before the first start.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._control: socket.socket | None = None
        self._is_ready = False

    def start(self) -> socket.socket:
        """Start the process unless it runs; does not wait for it.

        Returns:
            The connection to it.
        """
        with self._lock:
            if self.process and self._control and self.process.poll() is None:
                return self._control
            if self._control is not None:
                self._control.close()
            self._control, theirs = socket.socketpair()
            self._control.settimeout(START_SECONDS)
            self._is_ready = False
            path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
            kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", decode_forkserver.__file__, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=kept | _SET | {"PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C in a terminal must only reach the server
                )
            return self._control

    def fork(self) -> socket.socket:
        """A socket that is connected to a new decoder. Raises `OSError`."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                control = self.start()
                if not self._is_ready:
                    self._is_ready = control.recv(1) == decode_forkserver.READY
                socket.send_fds(control, [decode_forkserver.FORK], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def call(self, message: bytes, timeout: float, max_bytes: int) -> tuple[bytes, float]:
        """The reply of a new decoder to a message, with at most one byte more than `max_bytes`.

        Returns:
            The reply, and the seconds. It is incomplete if the decoder crashed or was too slow.

        Raises:
            ConnectionError: The process does not start.
        """
        for _ in range(2):
            start, reply = time.monotonic(), bytearray()
            with suppress(OSError), self.fork() as connection:
                start = time.monotonic()
                connection.settimeout(timeout + GRACE_SECONDS)
                # Few system calls, because a thread may wait for Python's lock after each one.
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(min(2**20, max_bytes + 1 - len(reply))):
                    reply += part
            seconds = time.monotonic() - start
            if reply or not self._has_ended():
                return bytes(reply), seconds
        raise ConnectionError("the fork server of image decoders does not start")

    def _has_ended(self) -> bool:
        """Whether the process has ended, and not only a decoder. It may be about to end."""
        with suppress(subprocess.TimeoutExpired):
            return self.process is not None and self.process.wait(0.1) is not None
        return False

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._control is not None and self.process is not None:
                self._control.close()
                try:
                    self.process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:  # it is still importing modules
                    self.process.kill()


@cache
def fork_server() -> ForkServer:
    """The fork server of this process. It has no settings; each request brings its own."""
    server = ForkServer()
    atexit.register(server.close)
    return server
