"""`owl2 caption`: a caption, or any answer, for each image of a folder.

::

    folder ──sorted names──► shard of this process, without finished ones ──threads──► images
    ──Engine in batches, or vLLM──► captions ──ShardedJsonl──► captions.jsonl
"""

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from owl2.checkpoints.provenance import fingerprint
from owl2.engine.engine import Engine
from owl2.engine.error_isolation import batch_or_errors
from owl2.engine.load_model import load_model
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_file, atomic_write_text
from owl2.processing.chat_template import user_message
from owl2.processing.image_io import load_image
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.progress import ProgressReporter
from owl2.runtime import select_device
from owl2.sharded_jsonl import ShardedJsonl, settings_conflict, to_json
from owl2.workers import WorkerRank, heartbeat, remove_heartbeats

# The prompt of the paper (Specification §1.5).
PROMPT = "Provide a one-sentence caption for the provided image."
ENGINES = ("owl2", "vllm")
EXTENSIONS = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
EXTENSIONS |= {".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PRINTED_ERRORS = 5  # all are in the report


@dataclass(frozen=True)
class CaptionConfig:
    """The options of `owl2 caption`.

    Attributes:
        output: The JSONL file to write.
        prompt: The question about each image.
        engine: One of `ENGINES`.
        batch_size: Images per batch of the engine "owl2".
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

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the captions depend on, except for rounding errors."""
        folder = Path(self.model)
        name = str(folder.resolve()) if folder.is_dir() else self.model
        return {
            "model": (fingerprint(folder) if folder.is_dir() else None) or name,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "quantize": self.quantize,
        }

    @property
    def report(self) -> Path:
        """The file next to the output with the settings and the errors."""
        return self.output.with_name(f"{self.output.stem}.report.json")

    @property
    def sampling(self) -> dict[str, Any]:
        """Greedy, so that an image has the same caption in every run."""
        return {"do_sample": False, "max_new_tokens": self.max_new_tokens}


def caption(config: CaptionConfig, console: Console) -> None:
    """Caption the images of a folder; a later run resumes and retries images that failed.

    With several processes (RANK, WORLD_SIZE) each captions a shard, and process 0 merges them.

    Raises:
        InputError: The folder does not exist or has no images; no image could be captioned; the
            output was not written by `owl2 caption`, or with other settings; see `ShardedJsonl`,
            `Engine.from_pretrained` and `Engine.chat`.
    """
    if config.engine not in ENGINES:
        raise InputError(
            f"--engine is {config.engine!r}. Choose from {', '.join(ENGINES)}.",
            ErrorCode.UNKNOWN_NAME,
        )
    settings, worker = config.settings, WorkerRank.from_environment()
    names = find_images(config.folder, config.recursive)
    _check_output(config, settings)
    output = config.output
    with (
        heartbeat(output.parent, worker),
        ShardedJsonl(output, settings, worker, "file_name", "error", "error", output) as records,
    ):
        shard = worker.shard(names)
        pending = [name for name in shard if name not in records]
        done = len(shard) - len(pending)
        with ProgressReporter(console, "captions", len(shard), done, "images") as progress:
            answers = _captions(config, pending, worker) if pending else iter(())
            for name, answer in zip(pending, answers, strict=True):
                key = "error" if isinstance(answer, InputError) else "caption"
                records.append([{"file_name": name, key: str(answer)}])
                progress.advance()
        if worker.rank:
            console.print("This shard is complete. Process 0 merges all shards.")
            return
        records.wait(names)
        errors = _merge(config, settings, names, records)
        records.remove()
    remove_heartbeats(output.parent)
    _print_summary(config, len(names), errors, console)


def find_images(folder: Path, recursive: bool = False) -> list[str]:
    """Sorted paths of the images in a folder, relative to it, by their file name extensions.

    Hidden files and folders are skipped.

    Raises:
        InputError: The folder does not exist or has no images.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder '{folder}'.", ErrorCode.FILE_NOT_FOUND)
    found: list[str] = []
    has_subfolders = False
    for directory, subfolders, names in os.walk(str(folder)):
        for name in names:
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith("."):
                found.append(Path(directory, name).relative_to(folder).as_posix())
        visible = [name for name in subfolders if not name.startswith(".")]
        has_subfolders |= bool(visible)
        subfolders[:] = visible if recursive else []
    if not found:
        hint = (
            " To include subfolders, add --recursive." if has_subfolders and not recursive else ""
        )
        extensions = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise InputError(
            f"There are no images in '{folder}' ({extensions}).{hint}", ErrorCode.EMPTY_DATASET
        )
    return sorted(found)


def _check_output(config: CaptionConfig, settings: Mapping[str, Any]) -> None:
    """Refuse an existing output that this command with these settings did not write."""
    if config.output.suffix != ".jsonl":
        raise InputError(
            f"--output-file is {config.output}. Its name must end with .jsonl.",
            ErrorCode.INVALID_VALUE,
        )
    if not config.output.exists():
        return
    try:
        written = json.loads(config.report.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{config.output} exists, and {config.report.name} does not show that `owl2 caption` "
            "wrote it. Choose another --output-file, or move it away.",
            ErrorCode.FILE_EXISTS,
        ) from error
    if written != settings:
        raise settings_conflict(config.output, settings, written)


# ------------------------------------------------------------------ captions


def _captions(
    config: CaptionConfig, names: Sequence[str], worker: WorkerRank
) -> Iterator[str | InputError]:
    """The caption of each image, in order, or the error that prevents it."""
    paths = (config.folder / name for name in names)
    if config.engine == "owl2":
        return _captions_by_engine(config, paths, _load_engine(config, worker))
    from owl2.vllm_plugin.offline import answer_all

    if config.quantize is not None or config.device is not None:
        raise InputError("--engine vllm has no --quantize and --device.", ErrorCode.CONFLICT)
    more: dict[str, Any] = {} if config.dtype is None else {"dtype": config.dtype}
    conversations = ([user_message(config.prompt, [path])] for path in paths)
    return answer_all(config.model, conversations, config.sampling, **more)


def _load_engine(config: CaptionConfig, worker: WorkerRank) -> Engine:
    processor = Owl2Processor.from_pretrained(config.model)
    device = worker.device(str(select_device(config.device)))
    model = load_model(config.model, device, config.dtype, quantize=config.quantize)
    engine = Engine(model, processor, enable_prefix_caching=False)  # all images differ
    # An error in the prompt would occur for every image: find it first.
    size = processor.image_processor.size
    blank = Image.new("RGB", (size, size))
    engine.chat([user_message(config.prompt, [blank])], do_sample=False, max_new_tokens=1)
    return engine


def _captions_by_engine(
    config: CaptionConfig, paths: Iterator[Path], engine: Engine
) -> Iterator[str | InputError]:
    images = _load_ahead(paths, engine.processor.image_processor, 2 * config.batch_size)
    while batch := list(islice(images, config.batch_size)):
        conversations: list[Any] = [
            [user_message(config.prompt, [image])]
            for image in batch
            if isinstance(image, Image.Image)
        ]
        answers = iter(batch_or_errors(engine, conversations, **config.sampling))
        for image in batch:
            yield image if isinstance(image, InputError) else next(answers)


def _load_ahead(
    paths: Iterator[Path], processor: Owl2ImageProcessor, count: int
) -> Iterator[Image.Image | InputError]:
    """Images as squares of the model's size, or their errors.

    Threads load up to `count` images in advance, while the model computes.
    """

    def load(path: Path) -> Image.Image | InputError:
        try:
            return processor.to_square(load_image(path, processor.max_pixels))
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:
        pending: deque[Future[Image.Image | InputError]] = deque()
        for path in paths:
            pending.append(pool.submit(load, path))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ------------------------------------------------------------------ output


def _merge(
    config: CaptionConfig, settings: Mapping[str, Any], names: Sequence[str], records: ShardedJsonl
) -> dict[str, str]:
    """Write the report and, if there are captions, the output. Returns the errors by name."""
    errors = {name: records.record(name)["error"] for name in names if name not in records}
    report = {
        "settings": settings,
        "images": len(names),
        "captions": len(names) - len(errors),
        "errors": [{"file_name": name, "error": error} for name, error in errors.items()],
    }
    # The report first: an output without one is refused by the next run.
    atomic_write_text(config.report, to_json(report, indent=2) + "\n")
    if len(errors) < len(names):
        with atomic_file(config.output) as file:
            file.writelines(
                f"{to_json(records.record(name))}\n" for name in names if name not in errors
            )
    return errors


def _print_summary(
    config: CaptionConfig, count: int, errors: Mapping[str, str], console: Console
) -> None:
    for name, error in islice(errors.items(), MAX_PRINTED_ERRORS):
        console.print(f"{name}: {error}", markup=False, highlight=False)
    if len(errors) > MAX_PRINTED_ERRORS:
        console.print(f"... and {len(errors) - MAX_PRINTED_ERRORS} more", highlight=False)
    if len(errors) == count:
        raise InputError(f"None of the {count} images could be captioned.", ErrorCode.EMPTY_DATASET)
    failed = f"; {len(errors):,} failed, see {config.report.name}" if errors else ""
    line = f"{count - len(errors):,} captions are in {config.output}{failed}"
    console.print(line, markup=False, highlight=False)
