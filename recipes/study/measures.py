"""The measures of the study: `python recipes/study/measures.py MODEL --start START --data DATA`.

    test_exact, test_choices, test_probe, hamexam ──owl2 eval──► scores, also without images
    test_exact ──Engine.score──► negative log-likelihood of the expected answers
    documents ──MODEL, START──► perplexity, KL divergence from START

The tests of images are custom questions of `owl2 eval`; `docs/study.md` describes the measures.
"""

import argparse
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import track

from owl2 import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import InputError
from owl2.eval.evaluate import EvalConfig, evaluate
from owl2.eval.samples import NO_IMAGE, evenly_spaced
from owl2.files import atomic_write_text
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor

# In the order of the tables. All are shares, except for those in nats and the perplexity.
MEASURES = {
    "choice": "one of four, by score",
    "choice_no_image": "one of four, without the image",
    "exact": "exact match",
    "exact_no_image": "exact match, without the image",
    "answer_nll": "negative log-likelihood of the answer (nats per token)",
    "answer_nll_no_image": "negative log-likelihood, without the image",
    "probe": "is there a ...",
    "probe_no_image": "is there a ..., without the image",
    "probe_f1": "is there a ..., F1",
    "probe_yes": "is there a ..., share of yes",
    "perplexity": "perplexity of held-out documents",
    "kl": "KL divergence from the start (nats per token)",
    "hamexam": "hamexam, by score",
}
BASELINES = {name: f"{name}{NO_IMAGE}" for name in ("choice", "exact", "answer_nll", "probe")}
# Of each task of `owl2 eval`: its file, and the measures by the names of the metrics.
IMAGE_TASKS = {
    "test_choices": {"choice": "accuracy", "choice_no_image": f"accuracy{NO_IMAGE}"},
    "test_exact": {"exact": "accuracy", "exact_no_image": f"accuracy{NO_IMAGE}"},
    "test_probe": {
        "probe": "accuracy", "probe_no_image": f"accuracy{NO_IMAGE}",
        "probe_f1": "f1", "probe_yes": "yes_ratio",
    },
}  # fmt: skip
TEXT_TASKS = {"hamexam": {"hamexam": "accuracy"}}
ANSWER_MEASURES = ("answer_nll", "answer_nll_no_image")
DOCUMENT_MEASURES = ("perplexity", "kl")
MAX_DOCUMENT = 512  # tokens
RESPONSES = "responses"
# Of the tasks of `owl2 eval`, as in training. The others are in float32, to see small differences.
DTYPE = "bfloat16"
console = Console(stderr=True, highlight=False)


def measure(
    model: Path, start: Path, data: Path, output: Path, *, limit: int | None = None,
    batch_size: int = 32, only: Collection[str] | None = None,
) -> dict[str, float | None]:  # fmt: skip
    """All measures of a model, or those named in `only`.

    The results are in `output`/measures.json, those of each item in `output`/responses. The same
    call resumes an interrupted one.

    Args:
        model: A checkpoint, or an adapter that names its base.
        start: The checkpoint before the training.
        data: As `data.py` writes it.
        limit: Items of each measure, from all categories.

    Raises:
        InputError: A model or a file cannot be read.
    """
    wanted = [name for name in MEASURES if only is None or name in only]
    found: dict[str, float | None] = {}
    for part, tasks in (("images", IMAGE_TASKS), ("text", TEXT_TASKS)):
        names = [name for name, own in tasks.items() if set(own) & set(wanted)]
        if not names:
            continue
        file = output / f"{part}.json"
        if not file.is_file():
            config = EvalConfig(
                ModelArgs(model, "cpu", DTYPE),
                output,
                tasks=",".join(str(data / f"{name}.jsonl") for name in names),
                batch_size=batch_size,
                limit=limit,
                no_image_baseline=any(name.endswith(NO_IMAGE) for name in wanted)
                and part == "images",
                prompts="plain",
            )
            results = evaluate(config, Console(quiet=True))["tasks"]
            kept = ("metrics", "per_category")
            parts = {n: {key: results[n].get(key, {}) for key in kept} for n in names}
            atomic_write_text(file, json.dumps(parts))
        metrics = json.loads(file.read_text("utf-8"))
        for name in names:
            own_metrics = metrics[name]["metrics"]
            found |= {key: own_metrics.get(own) for key, own in tasks[name].items()}
    if set(ANSWER_MEASURES) & set(wanted):
        found |= measure_answers(model, data / "test_exact.jsonl", output, limit)
    if set(DOCUMENT_MEASURES) & set(wanted):
        found |= measure_documents(model, start, data / "documents.jsonl", output, limit)
    found = {name: found[name] for name in wanted}
    atomic_write_text(output / "measures.json", json.dumps(found, indent=2) + "\n")
    return found


def category_scores(output: Path) -> dict[str, dict[str, float]]:
    """The measures of images by category of the questions, from the directory of `measure`."""
    results, found = json.loads((output / "images.json").read_text("utf-8")), {}
    for task, names in IMAGE_TASKS.items():
        for name in (*BASELINES, *BASELINES.values()):
            if (metric := names.get(name)) is not None:
                categories = results[task]["per_category"].items()
                found[name] = {category: values[metric] for category, values in categories}
    if (file := output / RESPONSES / "answers.jsonl").is_file():
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for category in dict.fromkeys(row["category"] for row in rows):
            own = [row for row in rows if row["category"] == category]
            for name in ANSWER_MEASURES:
                found.setdefault(name, {})[category] = fmean(row[name] for row in own)
    return found


def measure_answers(
    model: Path, file: Path, output: Path, limit: int | None = None
) -> dict[str, float]:
    """Mean over the questions of the mean over the tokens of -log p(expected answer).

    With a limit, the questions are other ones than those of ``exact``, which has equally many of
    each category. The values of each question are in `output`/responses/answers.jsonl.

    Args:
        file: Custom questions with images; the first of their answers is expected.
        limit: Number of questions, evenly spaced over the file.
    """
    questions = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    chosen = evenly_spaced(questions, len(questions) if limit is None else limit)
    engine = Engine.from_pretrained(model, device="cpu", dtype="float32")
    rows = []
    for question in track(chosen, "answers", console=console):
        text = {"type": "text", "text": question["question"]}
        image = {"type": "image", "image": str(file.parent / question["image"])}
        row = {key: question[key] for key in ("id", "category")}
        for name, content in zip(ANSWER_MEASURES, ([image, text], [text]), strict=True):
            messages = [{"role": "user", "content": content}]
            [score] = engine.score(messages, question["answers"][:1], normalize=True)
            row[name] = -score
        rows.append(row)
    _write_rows(output / RESPONSES / "answers.jsonl", rows)
    return {name: fmean(row[name] for row in rows) for name in ANSWER_MEASURES}


def measure_documents(
    model: Path, start: Path, file: Path, output: Path, limit: int | None = None
) -> dict[str, float]:
    """Perplexity of documents, and the mean divergence KL(start || model) of the next token.

    The values of each document are in `output`/responses/documents.jsonl.
    """
    texts = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()][:limit]
    args = ModelArgs(model, "cpu", "float32")
    first = ModelArgs(start, "cpu", "float32").load_model()
    second, processor = args.load_model(), args.load_processor()
    rows = []
    for index, text in enumerate(track(texts, "documents", console=console)):
        nll, kl = compare_next_tokens(first, second, document_ids(processor, text))
        rows.append({"id": str(index), "tokens": len(nll), "nll": sum(nll), "kl": sum(kl)})
    _write_rows(output / RESPONSES / "documents.jsonl", rows)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "perplexity": math.exp(sum(row["nll"] for row in rows) / tokens),
        "kl": sum(row["kl"] for row in rows) / tokens,
    }


def _write_rows(file: Path, rows: Sequence[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))


def document_ids(processor: Owl2Processor, text: str) -> list[int]:
    """The ids of a document with the begin token, if the tokenizer has one."""
    begin: list[int] = processor(text=[""])["input_ids"][0]
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return (begin + ids)[:MAX_DOCUMENT]


@torch.no_grad()
def compare_next_tokens(
    first: Owl2ForConditionalGeneration, second: Owl2ForConditionalGeneration, ids: Sequence[int]
) -> tuple[list[float], list[float]]:
    """For each token but the first: -log p of `second`, and the divergence KL(first || second)."""
    row = torch.tensor([list(ids)])
    logs = [
        one(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        for one in (first, second)
    ]  # 2 x (T - 1, V)
    nll = -logs[1].gather(-1, row[0, 1:, None])[:, 0]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    return nll.tolist(), kl.tolist()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("runs/study/data"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--only", nargs="+", choices=MEASURES)
    given = parser.parse_args()
    try:
        found = measure(given.model, given.start, given.data, given.output, limit=given.limit,
                        only=given.only)  # fmt: skip
    except InputError as error:
        parser.exit(2, f"{error}\n")
    for name, value in found.items():
        print(f"{MEASURES[name]:45} {'-' if value is None else f'{value:.4f}'}")


if __name__ == "__main__":
    main()
