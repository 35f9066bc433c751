"""`owl2 data convert`: converts the published files of a dataset to training data.

::

    published files ── converter ──► Sample ───────► OUT.jsonl, a conversation per line
                           └───────► SkippedRows ──► OUT.stats.json, counts by reason
    img2dataset's shards ── checked ──► OUT.yaml, an entry for `data` in a recipe

Images are not copied: the lines contain the paths of the authors' archives, and `images` in a
recipe is the directory with the unpacked archives.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from owl2.data.datasets.img2dataset import Shard, shard_patterns
from owl2.data.datasets.registry import DATASET_CARDS, read_published
from owl2.data.sample import Sample, SkippedRows, validated
from owl2.errors import ErrorCode, InputError
from owl2.files import (
    atomic_file,
    atomic_write_json,
    atomic_write_text,
    expand_user,
    require_writable,
)
from owl2.processing.messages import parse_messages
from owl2.progress import ProgressReporter
from owl2.registry import Option, check_options, look_up, read_setting

# The first line of a written .yaml file.
YAML_HEADER = "# An entry for `data` in a recipe"
PROGRESS_STEP = 1000  # items between two updates of the progress bar
# Options of every dataset with samples: the root of the image paths, which are then checked, and
# whether the first sample without its image stops the conversion, or such samples are skipped.
IMAGE_OPTIONS = {
    "check_images": Option(str | None, None),
    "missing": Option(Literal["stop", "skip"], "stop"),
}


def convert_dataset(
    name: str, source: Path, out: Path, settings: Sequence[str], console: Console | None = None
) -> None:
    """Converts the dataset `name` from the published files in the directory `source`.

    A failed conversion leaves no files. An older output of this command is replaced.

    Args:
        out: A .jsonl file; `.stats.json` is written next to it. For shards a .yaml file.
        settings: `option=value`: the options of the dataset, and `IMAGE_OPTIONS`.

    Raises:
        InputError: An unknown dataset or option, files that differ from the published ones, no
            samples, or `out` cannot be written or was not written by this command.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    card = look_up("dataset", name, DATASET_CARDS)
    suffix = ".yaml" if card.is_shards else ".jsonl"
    if out.suffix != suffix:
        raise InputError(f"{out}: the suffix must be {suffix}", ErrorCode.INVALID_VALUE)
    _refuse_foreign_file(out)
    require_writable(out)
    options = dict(read_setting(setting) for setting in settings)
    image_options = {} if card.is_shards else _pop_image_options(options)
    skipped: Counter[str] = Counter()
    items = _without_skipped(read_published(name, source, **options), skipped, name, console)
    if card.is_shards:
        summary = _write_entry(name, items, out, skipped)
    else:
        statistics = {"name": name, "options": {"source": str(source)} | options}
        summary = _write_samples(items, out, statistics, skipped, **image_options)
    console.print(f"Wrote {summary} to {out}", markup=False)
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    console.print(f"Skipped: {reasons or 'nothing'}", markup=False)


def listing() -> str:
    """All datasets with their files, origins and options."""
    blocks = []
    for name, card in DATASET_CARDS.items():
        known = card.options | ({} if card.is_shards else IMAGE_OPTIONS)
        options = " ".join(
            f"{key}={'...' if option.default is None else str(option.default).splitlines()[0]}"
            for key, option in known.items()
        )
        files = ", ".join(" or ".join(names) for names in card.files.values()) or card.contents
        blocks.append(
            f"{name}  (in the paper: {card.paper})\n  files    {files}\n"
            f"  from     {card.url}  ({card.license})\n  options  {options}\n"
        )
    return "\n".join(blocks)


def _pop_image_options(options: dict[str, Any]) -> dict[str, Any]:
    """Removes `IMAGE_OPTIONS` from `options`."""
    values = {key: options.pop(key) for key in IMAGE_OPTIONS if key in options}
    check_options("option", IMAGE_OPTIONS, values)
    directory = values.get("check_images")
    if directory is None and values.get("missing") == "skip":
        raise InputError("missing=skip needs check_images=DIR", ErrorCode.MISSING_VALUE)
    if directory is not None and not expand_user(directory).is_dir():
        raise InputError(f"check_images={directory}: no such directory", ErrorCode.FILE_NOT_FOUND)
    return values


def _refuse_foreign_file(out: Path) -> None:
    """Raises `InputError` if `out` exists and this command did not write it."""
    if not out.exists():
        return
    if out.suffix == ".yaml":
        with out.open("rb") as file:
            is_own = file.read(len(YAML_HEADER)) == YAML_HEADER.encode()
    else:
        is_own = out.with_suffix(".stats.json").exists()
    if not is_own:
        raise InputError(
            f"{out} exists and was not written by this command; move it away",
            ErrorCode.FILE_EXISTS,
        )


def _without_skipped(
    items: Iterable[Any], skipped: Counter[str], name: str, console: Console
) -> Iterator[Any]:
    """The other items, with a progress bar; counts the `SkippedRows` in `skipped`."""
    with ProgressReporter(console, name, unit="items", transient=True) as progress:
        for number, item in enumerate(items, start=1):
            if number % PROGRESS_STEP == 0:
                progress.advance(PROGRESS_STEP)
            if isinstance(item, SkippedRows):
                skipped[item.reason] += item.count
            else:
                yield item


def _write_samples(
    items: Iterable[Sample],
    out: Path,
    statistics: dict[str, Any],
    skipped: Counter[str],
    check_images: str | None = None,
    missing: str = "stop",
) -> str:
    samples = answers = 0
    seen: set[str] = set()
    with atomic_file(out) as file:
        for item in items:
            try:
                parsed = parse_messages(validated(item).messages)
            except InputError as error:
                if error.code is not ErrorCode.EMPTY_MESSAGE:
                    raise
                skipped["samples with an empty turn"] += 1
                continue
            sources = [*parsed.images, *(video.source for video in parsed.videos)]
            paths = {str(source) for source in sources if isinstance(source, Path)}  # not URLs
            if check_images is not None:
                files = [expand_user(check_images) / path for path in paths - seen]
                absent = [path for path in files if not path.exists()]  # a video can be a folder
                if absent and missing == "stop":
                    raise InputError(
                        f"{item.source}: the image {absent[0]} does not exist; missing=skip skips "
                        "such samples",
                        ErrorCode.MISSING_IMAGE,
                    )
                if absent:
                    skipped["samples whose image does not exist"] += 1
                    continue
            seen |= paths
            row = {"messages": item.messages, "source": item.source}
            row |= asdict(item.opinion) if item.opinion else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            samples += 1
            answers += sum(turn["role"] == "assistant" for turn in item.messages)
        if not samples:
            raise InputError(
                f"{statistics['name']}: no samples; skipped: {dict(skipped)}",
                ErrorCode.EMPTY_DATASET,
            )
    statistics |= {
        "samples": samples,
        "answers": answers,
        "images": len(seen),
        "skipped": dict(skipped),
    }
    atomic_write_json(out.with_suffix(".stats.json"), statistics)
    return f"{samples:,} samples with {answers:,} answers about {len(seen):,} images"


def _write_entry(name: str, shards: Iterable[Shard], out: Path, skipped: Counter[str]) -> str:
    found = list(shards)
    if not found:
        raise InputError(
            f"{name}: no complete shard with captions; skipped: {dict(skipped)}",
            ErrorCode.EMPTY_DATASET,
        )
    pairs = sum(shard.pairs for shard in found)
    # With the number of pairs as weight, several sources are sampled like one.
    patterns = shard_patterns([shard.path for shard in found])
    entry = {"name": name, "shards": patterns, "weight": pairs}
    summary = f"{len(found):,} shards with {pairs:,} pairs"
    text = yaml.safe_dump([entry], sort_keys=False, width=200)
    atomic_write_text(out, f"{YAML_HEADER}: {summary}\n{text}")
    return summary
