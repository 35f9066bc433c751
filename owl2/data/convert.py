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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from owl2.data.datasets.img2dataset import Shard, shard_patterns
from owl2.data.datasets.registry import DATASET_CARDS, DatasetCard
from owl2.data.sample import Sample, validated
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_file, atomic_write_text, require_writable
from owl2.json_records import SkippedRows
from owl2.progress import ProgressReporter
from owl2.registry import look_up, options_of, read_setting

# The first line of a written .yaml file.
YAML_HEADER = "# An entry for `data` in a recipe"
PROGRESS_STEP = 1000  # items between two updates of the progress bar

# The types of an option's value, by the type of its default. The default None stands for file
# names, which may look like numbers in YAML, and for counts.
_OPTION_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    str: ((str,), "a string"),
    type(None): ((str, int), "a string or an integer"),
}


@dataclass
class ImageCheck:
    """Checks that the images of samples exist.

    Attributes:
        directory: Root of the image paths; None for no check.
        missing: `stop` at the first sample without its image, or `skip` such samples.
        seen: The paths of all images so far.
    """

    directory: Path | None = None
    missing: str = "stop"
    seen: set[str] = field(default_factory=set)

    def has_images(self, sample: Sample) -> bool:
        """Whether the images of a sample exist.

        Raises:
            InputError: An image does not exist, and `missing` is `stop`.
        """
        new = set(_image_paths(sample)) - self.seen
        for path in (self.directory / name for name in new) if self.directory else ():
            if not path.is_file():
                if self.missing == "skip":
                    return False
                raise InputError(
                    f"{sample.source}: the image {path} does not exist; missing=skip skips such "
                    "samples",
                    ErrorCode.MISSING_IMAGE,
                )
        self.seen.update(new)
        return True


def convert_dataset(
    name: str, source: Path, out: Path, settings: Sequence[str], console: Console | None = None
) -> None:
    """Converts the dataset `name` from the published files in the directory `source`.

    A failed conversion leaves no files. An older output of this command is replaced.

    Args:
        out: A .jsonl file; `.stats.json` is written next to it. For shards a .yaml file.
        settings: `option=value`: the options of the dataset, and `check_images=DIR` with
            `missing=stop|skip`.

    Raises:
        InputError: An unknown dataset or option, files that differ from the published ones, no
            samples, or `out` cannot be written or was not written by this command.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    card = look_up("dataset", name, DATASET_CARDS)
    options = dict(read_setting(setting) for setting in settings)
    images = ImageCheck() if card.is_shards else _image_check(options)
    _check_options(name, card, options)
    suffix = ".yaml" if card.is_shards else ".jsonl"
    if out.suffix != suffix:
        raise InputError(f"{out}: the suffix must be {suffix}", ErrorCode.INVALID_VALUE)
    _refuse_foreign_file(out)
    require_writable(out)
    skipped: Counter[str] = Counter()
    items = _without_skipped(card.convert(source, **options), skipped, name, console)
    if card.is_shards:
        _write_entry(name, items, out, console)
    else:
        statistics = {"name": name, "options": {"source": str(source)} | options}
        _write_samples(items, out, images, statistics, skipped, console)
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    console.print(f"Skipped: {reasons or 'nothing'}", markup=False)


def listing() -> str:
    """All datasets with their files, origins and options."""
    blocks = []
    for name, card in DATASET_CARDS.items():
        options = " ".join(
            f"{key}={'...' if value is None else str(value).splitlines()[0]}"
            for key, value in options_of(card.convert).items()
        )
        blocks.append(
            f"{name}  (in the paper: {card.paper})\n  files    {card.files}\n"
            f"  from     {card.url}  ({card.license})\n  options  {options}\n"
        )
    return "\n".join(blocks)


def _image_check(options: dict[str, Any]) -> ImageCheck:
    """Removes the options of the check from `options`."""
    directory, missing = options.pop("check_images", None), options.pop("missing", "stop")
    look_up("value of missing", missing, {"stop": 0, "skip": 0})
    if directory is None:
        if missing == "skip":
            raise InputError("missing=skip needs check_images=DIR", ErrorCode.MISSING_VALUE)
        return ImageCheck()
    if not Path(str(directory)).is_dir():
        raise InputError(f"check_images={directory}: no such directory", ErrorCode.FILE_NOT_FOUND)
    return ImageCheck(Path(str(directory)), missing)


def _check_options(name: str, card: DatasetCard, options: Mapping[str, Any]) -> None:
    known = options_of(card.convert)
    for option, value in options.items():
        default = look_up(f"option of the dataset {name}", option, known)
        types, description = _OPTION_TYPES[type(default)]
        if type(value) not in types:
            raise InputError(f"{option}={value} must be {description}", ErrorCode.INVALID_TYPE)


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
    images: ImageCheck,
    statistics: dict[str, Any],
    skipped: Counter[str],
    console: Console,
) -> None:
    samples = answers = 0
    with atomic_file(out) as file:
        for item in items:
            if not images.has_images(validated(item)):
                skipped["samples whose image does not exist"] += 1
                continue
            row = {"messages": item.messages, "source": item.source}
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
        "images": len(images.seen),
        "skipped": dict(skipped),
    }
    atomic_write_text(out.with_suffix(".stats.json"), json.dumps(statistics, indent=2) + "\n")
    console.print(
        f"Wrote {samples:,} samples with {answers:,} answers about {len(images.seen):,} images to "
        f"{out}",
        markup=False,
    )


def _write_entry(name: str, shards: Iterable[Shard], out: Path, console: Console) -> None:
    found = list(shards)
    if not found:
        raise InputError(f"{name}: no complete shard", ErrorCode.EMPTY_DATASET)
    pairs = sum(shard.pairs for shard in found)
    # With the number of pairs as weight, several sources are sampled like one.
    patterns = shard_patterns([shard.path for shard in found])
    entry = {"name": name, "shards": patterns, "weight": pairs}
    summary = f"{len(found):,} shards with {pairs:,} pairs"
    text = yaml.safe_dump([entry], sort_keys=False, width=200)
    atomic_write_text(out, f"{YAML_HEADER}: {summary}\n{text}")
    console.print(f"Wrote {summary} to {out}", markup=False)


def _image_paths(sample: Sample) -> Iterator[str]:
    for turn in sample.messages:
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            if "path" in part:  # not for URLs
                yield str(part["path"])
