"""`owl2 data convert`: the published files of a public data set → what training reads.

::

    published files ── converter ──► Samples ──► OUT.jsonl, a conversation a line
                           └───────► SkippedRows ──► OUT.stats.json: what was left out, and why
    img2dataset's shards ── looked at ──► OUT.yaml: an entry for a recipe's `data`

Images are not touched: the lines hold paths as the authors' archives have them, and a recipe's
`images` says where the archives were unpacked.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from owl2.data.datasets.img2dataset import Shard, ranges
from owl2.data.datasets.registry import DATASET_CARDS, DatasetCard
from owl2.data.sample import Sample, validated
from owl2.errors import InputError
from owl2.files import atomic_file, atomic_write_text, require_writable
from owl2.json_records import SkippedRows
from owl2.registry import look_up, options_of, read_setting

# How a file begins that tells where shards are.
HEAD = "# An entry of a recipe's `data`"

PLAIN_SECONDS = 10.0

Item = TypeVar("Item")


@dataclass
class Images:
    """Where images are looked for while converting, if anywhere.

    `folder`: image paths start from it; None: nothing is looked for. `missing`: `stop` at the
    first sample whose image is not there, or `skip` it, counted.
    """

    folder: Path | None = None
    missing: str = "stop"
    seen: set[str] = field(default_factory=set)

    def has_all(self, sample: Sample) -> bool:
        """Notes the sample's images; whether they are there, as far as they are looked for.

        Raises:
            InputError: one is not, and `missing` is `stop`.
        """
        named = set(_images_of(sample)) - self.seen
        if self.folder is not None:
            for path in (self.folder / name for name in named):
                if path.is_file():
                    continue
                if self.missing == "skip":
                    return False
                raise InputError(
                    f"{sample.source}: the image {path} is not there. missing=skip leaves out "
                    "and counts what has no image."
                )
        self.seen.update(named)
        return True


def convert(
    name: str, source: Path, out: Path, settings: Sequence[str], console: Console | None = None
) -> None:
    """Write the data set `name`, from the published files in the folder `source`, to `out`.

    `out`: a .jsonl file, beside which .stats.json is written; for shards a .yaml file. `settings`:
    `option=value`: the data set's own, and `check_images=DIR` with `missing=stop|skip`. Nothing
    is left behind if it fails; an older file of this command is replaced.

    Raises:
        InputError: an unknown data set or option, files that are not as published, nothing left to
            write, a place that cannot be written to or where something else is.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    entry = look_up("public data set", name, DATASET_CARDS)
    given = dict(read_setting(setting) for setting in settings)
    is_shards = entry.is_shards
    images = Images() if is_shards else _take_images(given)
    _check(name, entry, given)
    ending = ".yaml" if is_shards else ".jsonl"
    if out.suffix != ending:
        raise InputError(f"{out}: the ending must be {ending}, which is what is written.")
    _refuse_others(out)
    require_writable(out)
    items = _watched(entry.convert(source, **given), name, console)
    if is_shards:
        _write_entry(name, items, out, console)
    else:
        _write_samples(name, items, out, images, {"source": str(source)} | given, console)


def listing() -> str:
    """What can be converted, from which files, where these are published, and the options."""
    return "\n".join(_described(name, entry) for name, entry in DATASET_CARDS.items())


def _described(name: str, entry: DatasetCard) -> str:
    lines = [f"{name}  (in the paper: {entry.paper})", f"  files    {entry.files}"]
    lines += [f"  from     {entry.url}  ({entry.licence})", "  options"]
    for key, value in options_of(entry.convert).items():
        lines[-1] += f" {key}={'...' if value is None else str(value).splitlines()[0]}"
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------ settings


def _take_images(given: dict[str, Any]) -> Images:
    folder, missing = given.pop("check_images", None), given.pop("missing", "stop")
    look_up("way with missing images", missing, {"stop": 0, "skip": 0})
    if folder is None:
        if missing == "skip":
            raise InputError("missing=skip needs check_images=DIR: where are the images?")
        return Images()
    if not Path(str(folder)).is_dir():
        raise InputError(f"check_images={folder}: there is no such folder.")
    return Images(Path(str(folder)), missing)


def _check(name: str, entry: DatasetCard, given: Mapping[str, Any]) -> None:
    known = options_of(entry.convert)
    for option, value in given.items():
        default = look_up(f"option of the data set {name}", option, known)
        kinds, what = _KINDS[type(default)]
        if type(value) not in kinds:
            such = "" if default is None else f", such as {default!r}"
            raise InputError(f"{option}={value}: it must be {what}{such}.")


# By the type of an option's default, the types that its value may have. None is the default of
# names of files and of numbers of things; a file's name may look like a number.
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a number"),
    str: ((str,), "a text"),
    type(None): ((str, int), "a name or a number"),
}


def _refuse_others(out: Path) -> None:
    """Raises `InputError` if `out` is a file that this command did not write."""
    if not out.exists():
        return
    if out.suffix == ".yaml":
        with out.open("rb") as file:
            ours = file.read(len(HEAD)) == HEAD.encode()
    else:
        ours = out.with_suffix(".stats.json").exists()
    if not ours:
        raise InputError(f"{out} is there already, and not from this command; move it away.")


# ------------------------------------------------------------------ writing


def _write_samples(
    name: str,
    items: Iterable[Any],
    out: Path,
    images: Images,
    options: Mapping[str, Any],
    console: Console,
) -> None:
    left_out: Counter[str] = Counter()
    samples = answers = 0
    with atomic_file(out) as file:
        for item in items:
            if isinstance(item, SkippedRows):
                left_out[item.reason] += item.count
            elif not images.has_all(validated(item)):
                left_out["samples whose image is not there"] += 1
            else:
                row = {"messages": item.messages, "source": item.source}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                samples += 1
                answers += sum(turn["role"] == "assistant" for turn in item.messages)
        if not samples:
            raise InputError(f"{name}: nothing is left to write. {_told(left_out)}")
    statistics = {
        "name": name,
        "options": dict(options),
        "samples": samples,
        "answers": answers,
        "images": len(images.seen),
        "left_out": dict(left_out),
    }
    atomic_write_text(out.with_suffix(".stats.json"), json.dumps(statistics, indent=2) + "\n")
    console.print(
        f"{samples:,} samples with {answers:,} answers about {len(images.seen):,} images "
        f"are in {out}",
        markup=False,
    )
    console.print(_told(left_out), markup=False)


def _write_entry(name: str, items: Iterable[Any], out: Path, console: Console) -> None:
    left_out: Counter[str] = Counter()
    found: list[Shard] = []
    for item in items:
        if isinstance(item, SkippedRows):
            left_out[item.reason] += item.count
        else:
            found.append(item)
    if not found:
        raise InputError(f"{name}: no shard is finished. {_told(left_out)}")
    pairs = sum(shard.pairs for shard in found)
    # With the pairs as weights, sources are drawn from as if all were one.
    entry = {"name": name, "shards": ranges([shard.path for shard in found]), "weight": pairs}
    head = f"{HEAD}: {len(found):,} shards with {pairs:,} pairs\n"
    atomic_write_text(out, head + yaml.safe_dump([entry], sort_keys=False, width=200))
    console.print(f"{len(found):,} shards with {pairs:,} pairs are listed in {out}", markup=False)
    console.print(_told(left_out), markup=False)


def _told(left_out: Mapping[str, int]) -> str:
    if not left_out:
        return "Nothing was left out."
    return "Left out: " + "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())


def _images_of(sample: Sample) -> Iterator[str]:
    for turn in sample.messages:
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            if "path" in part:  # not what is behind a URL
                yield str(part["path"])


def _watched(items: Iterable[Item], name: str, console: Console) -> Iterator[Item]:
    """The items, with their number on the terminal; in a log file a line every few seconds."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    last = time.monotonic()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(f"{name}: reading")
        for number, item in enumerate(items, start=1):
            if number % 1000 == 0:
                said = f"{name}: {number:,}"
                progress.update(task, description=said)
                if not console.is_terminal and time.monotonic() - last > PLAIN_SECONDS:
                    last = time.monotonic()
                    console.print(said, markup=False)
            yield item
