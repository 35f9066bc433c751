"""`owl2 caption`: a caption, or any answer, for each image of a folder.

::

    folder ──names, in order──► this process's share, less what is known ──threads──► images
    ──Engine in batches, or vLLM──► captions ──CaptionFiles──► captions.jsonl
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from owl2.caption.caption_files import CaptionFiles
from owl2.checkpoints.provenance import fingerprint
from owl2.engine.engine import Engine
from owl2.engine.load_model import load_model
from owl2.errors import InputError
from owl2.eval.generate import answer_or_reason
from owl2.eval.sharding import Team
from owl2.processing.chat_template import user_message
from owl2.processing.image_io import load_image
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.progress import ProgressReporter
from owl2.runtime import select_device

PROMPT = "Provide a one-sentence caption for the provided image."  # the paper's (SPEC 1.5)
ENGINES = ("owl2", "vllm")
IMAGES = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
IMAGES |= {".png", ".ppm", ".tif", ".tiff", ".webp"}
SHOWN = 5  # bad images that are named on the terminal; the report has all


@dataclass(frozen=True)
class Settings:
    """What `owl2 caption` does.

    Attributes:
        prompt: what is asked about each image.
        engine: one of `ENGINES`.
        batch_size: images at a time; of owl2's own engine.
    """

    folder: Path
    model: str
    output: Path
    prompt: str = PROMPT
    recursive: bool = False
    engine: str = "owl2"
    max_new_tokens: int = 64
    batch_size: int = 32
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None

    def identity(self) -> dict[str, Any]:
        """On what the captions depend, as far as it is not rounding."""
        folder = Path(self.model)
        place = str(folder.resolve()) if folder.is_dir() else self.model
        return {
            "model": (fingerprint(folder) if folder.is_dir() else None) or place,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "quantize": self.quantize,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Greedy, so that an image has the same caption whenever it is made."""
        return {"do_sample": False, "max_new_tokens": self.max_new_tokens}


def caption(settings: Settings, console: Console) -> None:
    """Caption a folder's images; started again after it was stopped, it goes on where it was.

    Of several processes (RANK, WORLD_SIZE) each does a share, and the first one puts the captions
    together.

    Raises:
        InputError: no folder, no images in it, not one that could be captioned; see
            `CaptionFiles`, `Engine.from_pretrained`, `Engine.chat`.
    """
    if settings.engine not in ENGINES:
        raise InputError(f"--engine is {settings.engine!r}; there are {' and '.join(ENGINES)}.")
    team = Team.of(os.environ)
    names = find_images(settings.folder, settings.recursive)
    with CaptionFiles(settings.output, settings.identity(), team) as files:
        share = team.share(names)
        todo = [name for name in share if not files.has_caption(name)]
        done = len(share) - len(todo)
        with ProgressReporter(console, "captions", len(share), done, "images") as progress:
            said = _answers(settings, todo, team) if todo else iter(())
            for name, text in zip(todo, said, strict=True):
                files.add(name, text)
                progress.advance()
        if team.rank:
            console.print("this process's share is done; process 0 puts all together")
            return
        files.wait(names)
        bad = files.finish(names)
    _tell(settings, len(names), bad, console)


def find_images(folder: Path, recursive: bool = False) -> list[str]:
    """Paths of the images in a folder, seen from it, in order; told by their endings. Hidden
    files and folders are left out.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder '{folder}'.")
    found: list[str] = []
    left_out = 0  # folders
    for place, folders, names in os.walk(str(folder)):
        for name in names:
            if Path(name).suffix.lower() in IMAGES and not name.startswith("."):
                found.append(Path(place, name).relative_to(folder).as_posix())
        inside = [name for name in folders if not name.startswith(".")]
        left_out += 0 if recursive else len(inside)
        folders[:] = inside if recursive else []
    if not found:
        hint = " Its folders were not looked into: add --recursive." if left_out else ""
        endings = ", ".join(sorted(ending[1:] for ending in IMAGES))
        raise InputError(f"There are no images in '{folder}' ({endings}).{hint}")
    return sorted(found)


# ------------------------------------------------------------------ answers


def _answers(settings: Settings, names: Sequence[str], team: Team) -> Iterator[str | InputError]:
    """A caption for each image, in order, or why it has none."""
    paths = (settings.folder / name for name in names)
    if settings.engine == "vllm":
        from owl2.vllm_plugin.offline import answer_all

        more: dict[str, Any] = {} if settings.dtype is None else {"dtype": settings.dtype}
        if settings.quantize is not None or settings.device is not None:
            raise InputError("--quantize and --device are of owl2's own engine, not of vLLM.")
        asked = ([user_message(settings.prompt, [path])] for path in paths)
        return answer_all(settings.model, asked, settings.options, **more)
    return _by_engine(settings, paths, _load(settings, team))


def _load(settings: Settings, team: Team) -> Engine:
    """The engine, where several processes have a GPU each on this process's own."""
    processor = Owl2Processor.from_pretrained(settings.model)
    device = select_device(settings.device)
    if device == torch.device("cuda") and team.size > 1:
        device = select_device(f"cuda:{team.local_rank}")
    model = load_model(settings.model, device, settings.dtype, quantize=settings.quantize)
    # Every image is new, so what is kept of one would serve no other.
    engine = Engine(model, processor, reuse=False)
    # What is wrong with the prompt is wrong with all of them: better found before.
    size = processor.image_processor.size
    blank = Image.new("RGB", (size, size))
    engine.chat([user_message(settings.prompt, [blank])], do_sample=False, max_new_tokens=1)
    return engine


def _by_engine(
    settings: Settings, paths: Iterator[Path], engine: Engine
) -> Iterator[str | InputError]:
    images = _opened(paths, engine.processor.image_processor, 2 * settings.batch_size)
    while batch := list(islice(images, settings.batch_size)):
        asked: list[Any] = [
            [user_message(settings.prompt, [image])]
            for image in batch
            if not isinstance(image, InputError)
        ]
        texts = iter(answer_or_reason(engine, asked, settings.options) if asked else [])
        for image in batch:
            yield image if isinstance(image, InputError) else next(texts)


def _opened(
    paths: Iterator[Path], processor: Owl2ImageProcessor, ahead: int
) -> Iterator[Image.Image | InputError]:
    """Images as squares of the model's size, or what is wrong with them; so many are opened by
    threads while the model computes."""

    def open_one(path: Path) -> Image.Image | InputError:
        try:
            return processor.to_square(load_image(path, processor.max_pixels))
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:
        waiting: deque[Future[Image.Image | InputError]] = deque()
        for path in paths:
            waiting.append(pool.submit(open_one, path))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ------------------------------------------------------------------ at the end


def _tell(settings: Settings, images: int, bad: dict[str, str], console: Console) -> None:
    for name, error in islice(bad.items(), SHOWN):
        console.print(f"{name}: {error}", markup=False, highlight=False)
    if len(bad) > SHOWN:
        console.print(f"... and {len(bad) - SHOWN} more", highlight=False)
    if len(bad) == images:
        raise InputError(f"None of the {images} images could be captioned.")
    report = f"{settings.output.stem}.report.json"
    told = f"; {len(bad):,} could not be captioned, see {report}" if bad else ""
    done = f"{images - len(bad):,} captions are in {settings.output}{told}"
    console.print(done, markup=False, highlight=False)
