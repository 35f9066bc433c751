"""`owl2 rate`: a score for each image or video.

::

    files ──shard of this process, without finished ones──► ImageScorer, or vLLM
    ──ImageRecords──► scores.jsonl ──► scores.csv, scores.html
"""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from owl2 import html
from owl2.data.image_records import Computed, ImageRecords
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_file, atomic_write_text
from owl2.processing.video import frames_per_second
from owl2.rate.inputs import find_inputs
from owl2.scoring.comparison import anchor_images
from owl2.scoring.methods import check_task
from owl2.scoring.scorer import ImageScorer, recognize
from owl2.workers import WorkerRank

STYLE = """
.scores { display: grid; grid-template-columns: repeat(auto-fill, minmax(14em, 1fr)); gap: 1em }
figure { margin: 0 } figure img { max-width: 100% } figcaption b { font-size: 1.2em }
"""


@dataclass(frozen=True)
class RateConfig:
    """The options of `owl2 rate`.

    Attributes:
        sources: Folders, files, and JSONL files with paths.
        output: The JSONL file to write, or a CSV file next to one.
        html: An HTML page to write, with thumbnails sorted by score; None: no page.
        task: "quality" or "aesthetics".
        kind: "image" or "video".
        method, prompt_form, score_range, boost: See `ImageScorer.from_pretrained`.
        anchors: A folder with the anchor images of Compare2Score, in the order of their names.
        engine: See `ModelArgs.check_engine`.
        batch_size: Images that are computed together.
    """

    sources: Sequence[Path]
    model_args: ModelArgs
    output: Path
    html: Path | None = None
    task: str = "quality"
    kind: str = "image"
    method: str | None = None
    prompt_form: str | None = None
    score_range: tuple[float, float] | None = None
    boost: bool = False
    anchors: Path | None = None
    recursive: bool = False
    engine: str = "owl2"
    batch_size: int = 16

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the scores depend on, except for rounding errors."""
        names = ("task", "kind", "method", "prompt_form", "score_range", "boost")
        anchors = (path.read_bytes() for path in anchor_images(self.anchors))
        return {
            "base": None,
            **self.model_args.settings,
            **{name: getattr(self, name) for name in names},
            "anchors": [hashlib.sha256(content).hexdigest() for content in anchors],
        }


def rate(config: RateConfig, console: Console) -> None:
    """Rate images or videos; a later run rates those that have no score or changed.

    Raises:
        InputError: No input exists; the model was not trained for the task; see
            `ImageRecords.run` and `ImageScorer`.
    """
    args = config.model_args
    args.check_engine(config.engine)
    checkpoint, method = recognize(args.model, config.method, args.base)
    # Before the model is loaded:
    check_task(method, checkpoint, config.task, config.kind, config.prompt_form)

    def compute(names: Sequence[str], worker: WorkerRank) -> Iterator[Computed]:
        engine = _load_engine(config, worker)
        scorer = ImageScorer(
            engine,
            method,
            checkpoint=checkpoint,
            prompt_form=config.prompt_form,
            score_range=config.score_range,
            boost=config.boost,
            anchors=anchor_images(config.anchors),
        )
        items: Iterator[Any] = (Path(name) for name in names)
        try:
            for score in scorer.score_iter(items, config.task, config.kind, config.batch_size):
                yield score if isinstance(score, InputError) else score.to_dict()
        finally:
            if config.engine == "vllm":
                engine.close()

    output = config.output
    is_csv = output.suffix.lower() == ".csv"
    records = ImageRecords(
        output.with_suffix(".jsonl") if is_csv else output,
        config.settings,
        "owl2 rate",
        "scores",
        key="image",
    )
    found = find_inputs(config.sources, config.kind, config.recursive)
    try:
        has_output = records.run(found, compute, console)
    except InputError as error:
        if error.code is ErrorCode.UNREADABLE_FILE and records.output.exists():
            _write_views(config, records, is_csv)  # the scores of all others
        raise
    if has_output:
        _write_views(config, records, is_csv)


def _load_engine(config: RateConfig, worker: WorkerRank) -> Any:
    """The engine; each of several processes uses its own GPU."""
    args = config.model_args
    if config.engine == "vllm":
        from owl2.vllm_plugin.offline import VllmEngine

        return VllmEngine(args.model, dtype=args.dtype or "auto")
    args = args.for_worker(worker)
    # The cache of image features is for Compare2Score, which uses each image several times.
    return Engine(args.load_model(), args.load_processor(), enable_prefix_caching=True)


# ------------------------------------------------------------------ CSV and HTML


def _write_views(config: RateConfig, records: ImageRecords, is_csv: bool) -> None:
    if is_csv:
        _write_csv(config.output, records)
    if config.html is not None:
        atomic_write_text(config.html, _page(config, list(records.rows())))


def _write_csv(path: Path, records: ImageRecords) -> None:
    """A row for each image: its name, score and standard deviation, and a column for each label."""
    with atomic_file(path) as file:
        writer = None
        for row in records.rows():
            values = {"image": row["image"], "score": row["score"]}
            values |= {"std": row["std"]} if "std" in row else {}
            values |= row.get("probabilities", {})
            values |= {
                f"preference_{index}": value
                for index, value in enumerate(row.get("preferences", ()), 1)
            }
            if writer is None:
                writer = csv.DictWriter(file, list(values), lineterminator="\n")
                writer.writeheader()
            writer.writerow(values)


def _page(config: RateConfig, rows: list[dict[str, Any]]) -> str:
    """Thumbnails with their scores, the best first."""
    figures = []
    for row in sorted(rows, key=lambda row: -row["score"]):
        name, source = row["image"], Path(row["image"])
        try:
            image = frames_per_second(source)[0] if config.kind == "video" else source
            shown = html.thumbnail(image)
        except InputError as error:
            shown = html.error_text(error)
        shares = " · ".join(
            f"{label} {value:.0%}" for label, value in row.get("probabilities", {}).items()
        )
        std = f" ± {row['std']:.3f}" if row.get("std") is not None else ""
        figures.append(
            f"<figure>{shown}<figcaption><b>{row['score']:.3f}</b>{std}<br>"
            f"<small>{escape(name)}<br>{escape(shares)}</small></figcaption></figure>"
        )
    title = f"{config.task.capitalize()} of {len(rows):,} {config.kind}s"
    intro = f"<p>Model: {escape(str(config.model_args.model))}</p>"
    return html.page(title, f'{intro}<div class="scores">{"".join(figures)}</div>', STYLE)
