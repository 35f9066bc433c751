"""One record for each image of a run: resumable, shared by processes, with a report of the errors.

::

    names ──shard of this process, without finished ones──► compute ──ShardedJsonl──► parts
    ──process 0, when all shards are complete──► NAME.report.json, NAME.jsonl

`owl2 caption` and `owl2 rate` are such runs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from owl2.data.image_folder import (
    ImageFolder,
    name_fields,
    name_of,
    read_versions,
    version_fields,
)
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_file, atomic_write_text
from owl2.progress import ProgressReporter
from owl2.sharded_jsonl import Record, ShardedJsonl, remove_parts, settings_conflict, to_json
from owl2.workers import WorkerRank, heartbeat

MAX_PRINTED_ERRORS = 5  # all are in the report
# Files that could not be read, unlike images that are corrupt or too large.
UNREAD = (ErrorCode.MISSING_IMAGE, ErrorCode.UNREADABLE_FILE)
# The fields of an image, or the error that prevents them.
Computed = Mapping[str, Any] | InputError


@dataclass(frozen=True)
class ImageRecords:
    """A run over images.

    Attributes:
        output: The JSONL file to write.
        settings: JSON values on which the records depend.
        command: For messages: "owl2 caption".
        noun: Plural, of the records: "captions".
        key: The field with the name of the image.
    """

    output: Path
    settings: Mapping[str, Any]
    command: str
    noun: str
    key: str = "file_name"

    @property
    def report(self) -> Path:
        """The file next to the output with the settings and the errors."""
        return self.output.with_name(f"{self.output.stem}.report.json")

    def run(
        self,
        images: ImageFolder,
        compute: Callable[[Sequence[str], WorkerRank], Iterator[Computed]],
        console: Console,
    ) -> bool:
        """Compute the records of images that have none or changed.

        With several processes (RANK, WORLD_SIZE) each computes a shard, and process 0 merges them.

        Args:
            compute: The records of the given images, in order. It is called only if there are any.

        Returns:
            Whether this process has written the output.

        Raises:
            InputError: No record could be computed; files or folders could not be read, although
                the records of all others are written; the output was not written by this command,
                or with other settings, or cannot be written; see `ShardedJsonl`.
        """
        worker = WorkerRank.from_environment()
        versions, finished = images.versions, self._finished_versions()
        name_in = partial(name_of, key=self.key)

        def is_current(record: Record) -> bool:
            name = name_in(record)
            return bool(versions.get(name) == record.get("version", finished.get(name)))

        with (
            heartbeat(self.output.parent, worker),
            ShardedJsonl(
                self.output,
                self.settings,
                worker,
                key=name_in,
                retry="error",
                on_other_settings="error",
                finished=self.output,
                is_current=is_current,
            ) as records,
        ):
            shard = worker.shard(list(versions))
            pending = [name for name in shard if name not in records]
            done = len(shard) - len(pending)
            with ProgressReporter(console, self.noun, len(shard), done, "images") as progress:
                answers = compute(pending, worker) if pending else iter(())
                for name, answer in zip(pending, answers, strict=True):
                    record: Record = {self.key: name, "version": versions[name]}
                    if isinstance(answer, InputError):
                        record |= {"error": str(answer), "code": answer.code}
                    else:
                        record |= answer
                    records.append([record])
                    progress.advance()
            if worker.rank:
                console.out("This shard is complete. Process 0 merges all shards.")
                return False
            records.wait(list(versions))
            self._merge(images, records, console)
        return True

    def rows(self) -> Iterator[Record]:
        """The rows of the output."""
        with self.output.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def _finished_versions(self) -> dict[str, str]:
        """The version of each image in an existing output.

        Raises:
            InputError: This command with these settings did not write the output.
        """
        if self.output.suffix != ".jsonl":
            raise InputError(
                f"--output-file is {self.output}. Its name must end with .jsonl.",
                ErrorCode.INVALID_VALUE,
            )
        if not self.output.exists():
            return {}
        try:
            report = json.loads(self.report.read_text(encoding="utf-8"))
            written, versions = report["settings"], read_versions(report)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.output} exists, and {self.report.name} does not show that `{self.command}` "
                "wrote it. Choose another --output-file, or move it away.",
                ErrorCode.FILE_EXISTS,
            ) from error
        if written != json.loads(json.dumps(self.settings)):
            raise settings_conflict(self.output, self.settings, written)
        return versions

    def _merge(self, images: ImageFolder, records: ShardedJsonl, console: Console) -> None:
        """Write the report and, if there are records, the output; print a summary.

        Raises:
            InputError: Files or folders could not be read, or there are no records.
        """
        names = images.versions
        errors = {name: records.record(name) for name in names if name not in records}
        for name, reason in images.unreadable.items():
            errors[f"{name}/"] = {"error": f"The folder cannot be read: {reason}."}
        count = sum(name in records for name in names)
        report = {
            "settings": self.settings,
            "images": len(names),
            self.noun: count,
            **version_fields(names),
            "errors": [
                name_fields(name) | {key: row[key] for key in ("error", "code") if key in row}
                for name, row in errors.items()
            ],
            "skipped": [
                name_fields(name) | {"reason": reason} for name, reason in images.skipped.items()
            ],
        }
        # The report first: an output without one is refused by the next run.
        atomic_write_text(self.report, to_json(report, indent=2) + "\n")
        if count:
            with atomic_file(self.output) as file:
                for name in names:
                    if name in records:
                        row = {**records.record(name), **name_fields(name, self.key)}
                        row.pop("version", None)
                        file.write(f"{to_json(row)}\n")
        remove_parts(self.output)
        _print_list(console, [f"{name}: {row['error']}" for name, row in errors.items()])
        _print_list(console, [f"{name}: skipped, {kind}" for name, kind in images.skipped.items()])
        if not count:
            raise InputError(
                f"There are no {self.noun} of the {len(names)} images, because of these errors.",
                ErrorCode.EMPTY_DATASET,
            )
        failed = f"; {len(names) - count:,} failed, see {self.report.name}"
        shown = failed if count < len(names) else ""
        console.out(f"{count:,} {self.noun} are in {self.output}{shown}")
        unread = sum(row.get("code") in UNREAD for row in errors.values())
        if unread or images.unreadable:
            raise InputError(
                f"{unread:,} of {len(names):,} images and {len(images.unreadable):,} folders could "
                f"not be read, see {self.report.name}. Run the same command again for them.",
                ErrorCode.UNREADABLE_FILE,
            )


def _print_list(console: Console, lines: Sequence[str]) -> None:
    for line in lines[:MAX_PRINTED_ERRORS]:
        console.out(line)
    if len(lines) > MAX_PRINTED_ERRORS:
        console.out(f"... and {len(lines) - MAX_PRINTED_ERRORS:,} more")
