"""`owl2 caption`: a caption, or any answer, for each image of a folder.

::

    folder ──sorted names──► shard of this process, without finished ones
    ──Engine in batches, or vLLM──► captions ──ShardedJsonl──► captions.jsonl
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from owl2.caption.image_folder import (
    ImageFolder,
    find_images,
    name_fields,
    name_of,
    read_versions,
    version_fields,
)
from owl2.checkpoints.weight_files import fingerprint
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.engine.offline import answer_all, output_all
from owl2.engine.output import CompletionChunk
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_file, atomic_write_text, expand_user
from owl2.processing.messages import user_message
from owl2.progress import ProgressReporter
from owl2.runtime import select_device
from owl2.sharded_jsonl import Record, ShardedJsonl, remove_parts, settings_conflict, to_json
from owl2.workers import WorkerRank, heartbeat

# The prompt of the paper (Specification §1.5).
PROMPT = "Provide a one-sentence caption for the provided image."
ENGINES = ("owl2", "vllm")
MAX_PRINTED_ERRORS = 5  # all are in the report
# Files that could not be read, unlike images that are corrupt or too large.
UNREAD = (ErrorCode.MISSING_IMAGE, ErrorCode.UNREADABLE_FILE)


@dataclass(frozen=True)
class CaptionConfig:
    """The options of `owl2 caption`.

    Attributes:
        output: The JSONL file to write.
        prompt: The question about each image.
        engine: One of `ENGINES`.
        batch_size: Images per batch of the engine "owl2".
        structured_outputs: As `Engine.chat` takes it. With a JSON schema, captions are JSON values.
    """

    folder: Path
    model_args: ModelArgs
    output: Path
    prompt: str = PROMPT
    recursive: bool = False
    engine: str = "owl2"
    max_new_tokens: int = 64
    batch_size: int = 32
    structured_outputs: Mapping[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the captions depend on, except for rounding errors."""
        folder = expand_user(self.model_args.model)
        name = str(folder.resolve()) if folder.is_dir() else self.model_args.model
        structured = self.structured_outputs
        return {
            "model": (fingerprint(folder) if folder.is_dir() else None) or name,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "quantize": self.model_args.quantize,
        } | ({"structured_outputs": structured} if structured else {})

    @property
    def report(self) -> Path:
        """The file next to the output with the settings and the errors."""
        return self.output.with_name(f"{self.output.stem}.report.json")


def caption(config: CaptionConfig, console: Console) -> None:
    """Caption the images of a folder; a later run captions the images that have none or changed.

    With several processes (RANK, WORLD_SIZE) each captions a shard, and process 0 merges them.

    Raises:
        InputError: The folder does not exist or has no images; no image could be captioned; files
            or subfolders could not be read, although the captions of all others are written; the
            output was not written by `owl2 caption`, or with other settings, or cannot be written;
            see `ShardedJsonl`, `Engine.from_pretrained` and `Engine.chat`.
    """
    if config.engine not in ENGINES:
        raise InputError(
            f"--engine is {config.engine!r}. Choose from {', '.join(ENGINES)}.",
            ErrorCode.UNKNOWN_NAME,
        )
    settings, worker, output = config.settings, WorkerRank.from_environment(), config.output
    found = find_images(config.folder, config.recursive)
    names, versions = list(found.versions), found.versions
    captioned = _captioned_versions(config, settings)

    def is_current(record: Record) -> bool:
        name = name_of(record)
        return bool(versions.get(name) == record.get("version", captioned.get(name)))

    with (
        heartbeat(output.parent, worker),
        ShardedJsonl(
            output, settings, worker, name_of, "error", "error", output, is_current
        ) as records,
    ):
        shard = worker.shard(names)
        pending = [name for name in shard if name not in records]
        done = len(shard) - len(pending)
        with ProgressReporter(console, "captions", len(shard), done, "images") as progress:
            answers = _captions(config, pending, worker) if pending else iter(())
            for name, answer in zip(pending, answers, strict=True):
                record = {"file_name": name, "version": versions[name]}
                if isinstance(answer, InputError):
                    record |= {"error": str(answer), "code": answer.code}
                else:
                    record["caption"] = answer
                records.append([record])
                progress.advance()
        if worker.rank:
            console.out("This shard is complete. Process 0 merges all shards.")
            return
        records.wait(names)
        _merge(config, settings, found, records, console)


def _captioned_versions(config: CaptionConfig, settings: Mapping[str, Any]) -> dict[str, str]:
    """The version of each image in an existing output.

    Raises:
        InputError: This command with these settings did not write the output.
    """
    if config.output.suffix != ".jsonl":
        raise InputError(
            f"--output-file is {config.output}. Its name must end with .jsonl.",
            ErrorCode.INVALID_VALUE,
        )
    if not config.output.exists():
        return {}
    try:
        report = json.loads(config.report.read_text(encoding="utf-8"))
        written, versions = report["settings"], read_versions(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{config.output} exists, and {config.report.name} does not show that `owl2 caption` "
            "wrote it. Choose another --output-file, or move it away.",
            ErrorCode.FILE_EXISTS,
        ) from error
    if written != settings:
        raise settings_conflict(config.output, settings, written)
    return versions


def _captions(config: CaptionConfig, names: Sequence[str], worker: WorkerRank) -> Iterator[Any]:
    """The caption of each image, in order, or the error that prevents it."""
    paths = (config.folder / name for name in names)
    conversations = ([user_message(config.prompt, [path])] for path in paths)
    # Greedy, so that an image has the same caption in every run.
    sampling: dict[str, Any] = {"do_sample": False, "max_new_tokens": config.max_new_tokens}
    if config.engine == "owl2":
        engine = load_engine(config, worker)
        if config.structured_outputs:
            sampling["structured_outputs"] = config.structured_outputs
            engine.sampling_params(**sampling)  # an error would occur for every image
            outputs = output_all(engine, conversations, config.batch_size, **sampling)
            return (_value(output, "json" in config.structured_outputs) for output in outputs)
        return answer_all(engine, conversations, config.batch_size, **sampling)
    from owl2.vllm_plugin.offline import answer_all as answer_all_with_vllm

    args = config.model_args
    unsupported = (args.quantize, args.device, args.base, config.structured_outputs)
    if any(option is not None for option in unsupported):
        raise InputError(
            "--engine vllm has no --quantize, --device, --base, --json-schema and --choice.",
            ErrorCode.CONFLICT,
        )
    more: dict[str, Any] = {} if args.dtype is None else {"dtype": args.dtype}
    return answer_all_with_vllm(args.model, conversations, sampling, **more)


def _value(output: CompletionChunk | InputError, is_json: bool) -> Any:
    """The answer, or the JSON value that it contains; an error if it is not complete."""
    if isinstance(output, InputError):
        return output
    if output.finish_reason == "length":
        return InputError(
            f"The answer is not complete after {output.num_tokens} tokens. Increase "
            "--max-new-tokens.",
            ErrorCode.TOO_LONG,
        )
    if not is_json:
        return output.text
    try:
        value = json.loads(output.text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:  # for example a number above 1e308
        return InputError(f"The answer cannot be stored: {error}.", ErrorCode.INVALID_FORMAT)
    return value


def load_engine(config: CaptionConfig, worker: WorkerRank) -> Engine:
    """The engine; each of several processes uses its own GPU.

    Raises:
        InputError: The checkpoint cannot be loaded, or the prompt is invalid.
    """
    device = worker.device(str(select_device(config.model_args.device)))
    args = replace(config.model_args, device=device)
    engine = Engine(args.load_model(), args.load_processor())  # no prefix cache: all images differ
    # An error in the prompt would occur for every image: find it first.
    size = engine.processor.image_processor.edge
    engine.encode([user_message(config.prompt, [Image.new("RGB", (size, size))])])
    return engine


def _merge(
    config: CaptionConfig,
    settings: Mapping[str, Any],
    folder: ImageFolder,
    records: ShardedJsonl,
    console: Console,
) -> None:
    """Write the report and, if there are captions, the output; print a summary.

    Raises:
        InputError: Files or folders could not be read, or no image could be captioned.
    """
    names = folder.versions
    errors = {name: records.record(name) for name in names if name not in records}
    for name, reason in folder.unreadable.items():
        errors[f"{name}/"] = {"error": f"The folder cannot be read: {reason}."}
    count = sum(name in records for name in names)
    report = {
        "settings": settings,
        "images": len(names),
        "captions": count,
        **version_fields(names),
        "errors": [
            name_fields(name) | {key: row[key] for key in ("error", "code") if key in row}
            for name, row in errors.items()
        ],
        "skipped": [
            name_fields(name) | {"reason": reason} for name, reason in folder.skipped.items()
        ],
    }
    # The report first: an output without one is refused by the next run.
    atomic_write_text(config.report, to_json(report, indent=2) + "\n")
    if count:
        with atomic_file(config.output) as file:
            for name in names:
                if name in records:
                    row = name_fields(name) | {"caption": records.record(name)["caption"]}
                    file.write(f"{to_json(row)}\n")
    remove_parts(config.output)
    _print_list(console, [f"{name}: {row['error']}" for name, row in errors.items()])
    _print_list(console, [f"{name}: skipped, {kind}" for name, kind in folder.skipped.items()])
    if not count:
        raise InputError(
            f"None of the {len(names)} images could be captioned.", ErrorCode.EMPTY_DATASET
        )
    failed = f"; {len(names) - count:,} failed, see {config.report.name}"
    console.out(f"{count:,} captions are in {config.output}{failed if count < len(names) else ''}")
    unread = sum(row.get("code") in UNREAD for row in errors.values())
    if unread or folder.unreadable:
        raise InputError(
            f"{unread:,} of {len(names):,} images and {len(folder.unreadable):,} folders could not "
            f"be read, see {config.report.name}. Run the same command again to caption them.",
            ErrorCode.UNREADABLE_FILE,
        )


def _print_list(console: Console, lines: Sequence[str]) -> None:
    for line in lines[:MAX_PRINTED_ERRORS]:
        console.out(line)
    if len(lines) > MAX_PRINTED_ERRORS:
        console.out(f"... and {len(lines) - MAX_PRINTED_ERRORS:,} more")
