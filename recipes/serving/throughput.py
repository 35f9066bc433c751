"""Offline throughput of image questions: owl2's Engine and vLLM on the same checkpoint.

::

    make ──► FOLDER/model: random weights, a tokenizer, a processor
    ours | vllm ──► FILE.json, each in its own environment
    all ──► both in turns, several rounds ──► a table, and FOLDER/throughput.json
    capacity ──► requests per day on one machine, and machines for a number of requests per day

Batches of 1, 4 and 16 requests, each with a different image, so that the time includes image
preprocessing and encoding. Decoding is greedy with a fixed length, and caches across requests are
off.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

COUNTS = (1, 4, 16)  # requests per batch
NEW = 64  # tokens of an answer
REPEATS = 3  # after one warm-up
QUESTION = "what is in this image, what is it doing there, and what color is it? " * 3
IMAGE = (320, 240)  # pixels
SECONDS_A_DAY = 24 * 60 * 60

Messages = list[dict[str, Any]]
Answer = Callable[[Sequence[Messages], int], list[list[int]]]  # conversations, new tokens → ids


def make(folder: Path, size: str, dtype: str, tokenizer: Path | None) -> None:
    """Write a checkpoint with random weights.

    Args:
        tokenizer: A SentencePiece file. Random weights generate any id, so a server, which decodes
            answers to text, needs a tokenizer for the whole vocabulary. None: train a small one.
    """

    from owl2.bench.presets import BenchModel
    from owl2.processing.image_processing import Owl2ImageProcessor
    from owl2.processing.processor import Owl2Processor
    from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer

    model = BenchModel(size=size, device="cpu", dtype=dtype).load()
    directory = folder / "model"
    model.save_pretrained(directory)
    file = directory / "tokenizer.model"
    if tokenizer:
        shutil.copyfile(tokenizer, file)
    else:
        train_tokenizer([QUESTION, "USER: ASSISTANT:"], file, 300)
    config = model.config
    Owl2Processor(
        Owl2ImageProcessor(config.image_size),
        Owl2Tokenizer(file),
        num_image_tokens=config.num_image_tokens,
        image_token_id=config.image_token_id,
    ).save_pretrained(directory)


def ours(model: Path, threads: int) -> Answer:
    """owl2's Engine."""
    import torch

    from owl2 import Engine
    from owl2.engine.sampling_params import SamplingParams

    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    engine = Engine.from_pretrained(model, dtype=_dtype(model), enable_prefix_caching=False)
    if engine.core is None:
        raise SystemExit(f"{model} is shared out or offloaded, and has no fast path")
    runner = engine.core

    def answer(conversations: Sequence[Messages], new: int) -> list[list[int]]:
        inputs = engine.processor.apply_chat_template(
            list(conversations), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        rows = zip(inputs["input_ids"], inputs["pixel_values"].split(1), strict=True)
        prompts = [runner.prepare(ids, image) for ids, image in rows]
        return runner.generate(prompts, SamplingParams(), [new] * len(prompts), ())

    return answer


def vllm(model: Path, threads: int) -> Answer:
    """vLLM with its default settings, except that caches across requests are off."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model),
        dtype=_dtype(model),
        max_model_len=min(1024, _config(model)["max_position_embeddings"]),
        max_num_seqs=max(COUNTS),
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
    )

    def answer(conversations: Sequence[Messages], new: int) -> list[list[int]]:
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [[_for_vllm(message) for message in messages] for messages in conversations]
        return [list(out.outputs[0].token_ids) for out in engine.chat(asked, how, use_tqdm=False)]

    return answer


def _for_vllm(message: dict[str, Any]) -> dict[str, Any]:
    parts = [
        {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


IMPLEMENTATIONS: dict[str, tuple[Callable[[Path, int], Answer], Sequence[str]]] = {
    "ours": (ours, ("torch", "transformers")),
    "vllm": (vllm, ("torch", "transformers")),
}


def measure(name: str, model: Path, new: int, threads: int) -> dict[str, Any]:
    """Seconds to the first tokens and to the last, and what follows from them.

    Returns:
        For each count of requests: `seconds` and `first_seconds` of each repetition;
        `tokens_per_second`, images and prompts included; `answers` of the first, the ids.
    """
    prepare, packages = IMPLEMENTATIONS[name]
    answer = prepare(model, threads)
    return {
        "implementation": name,
        "versions": {package: version(package) for package in packages},
        "requests": {str(count): _timed(answer, count, new) for count in COUNTS},
    }


def _timed(answer: Answer, count: int, new: int) -> dict[str, Any]:
    seen = count * 1000  # so that no image is repeated
    answers = answer(conversations(count, seen), new)
    if any(len(ids) != new for ids in answers):
        raise RuntimeError(f"answers of {[len(ids) for ids in answers]} tokens instead of {new}")
    first: list[float] = []
    seconds: list[float] = []
    for _ in range(REPEATS):
        for times, tokens in ((first, 1), (seconds, new)):
            seen += count
            asked = conversations(count, seen)
            start = time.perf_counter()
            answer(asked, tokens)
            times.append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "first_seconds": first,
        "tokens_per_second": count * new / statistics.median(seconds),
        "answers": answers,
    }


def conversations(count: int, seen: int) -> list[Messages]:
    """`count` questions, each with a different image, from number `seen` on."""
    import numpy as np
    from PIL import Image

    made = []
    for number in range(seen, seen + count):
        colors = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(colors).resize(IMAGE)
        parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        made.append([{"role": "user", "content": parts}])
    return made


def measure_all(
    folder: Path, model: Path, rounds: int, vllm_python: list[str], options: list[str]
) -> None:
    """Run both in turns, each in its own process, for `rounds` rounds; print a table."""
    found: dict[str, list[dict]] = {name: [] for name in IMPLEMENTATIONS}
    for number in range(rounds):
        for name in IMPLEMENTATIONS:
            python = vllm_python if name == "vllm" else [sys.executable]
            output = folder / f"{name}-{number}.json"
            command = [*python, __file__, name, str(folder), "--model", str(model)]
            with output.with_suffix(".log").open("w") as log:
                load = os.getloadavg()[0]  # before the measurement
                subprocess.run(
                    [*command, "--output", str(output), *options],
                    check=True,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            found[name].append(json.loads(output.read_text()) | {"load_before": load})
            print(f"round {number + 1}, {name}: done", flush=True)
    (folder / "throughput.json").write_text(json.dumps(found))
    print(table(found))


def table(found: dict[str, list[dict]]) -> str:
    """Medians over the rounds, each round, and the number of equal answers."""
    lines = [
        "| requests | | tokens/s | each round | first token, s | answers as ours |",
        "|---:|---|---:|---|---:|---:|",
    ]
    for count in map(str, COUNTS):
        expected = found["ours"][0]["requests"][count]["answers"]
        for name, runs in found.items():
            figures = [run["requests"][count] for run in runs]
            each = [round(f["tokens_per_second"], 1) for f in figures]
            first = statistics.median(s for f in figures for s in f["first_seconds"])
            same = sum(map(list.__eq__, expected, figures[0]["answers"]))
            lines.append(
                f"| {count} | {name} | {statistics.median(each):.1f} "
                f"| {' '.join(map(str, each))} | {first:.2f} | {same} of {count} |"
            )
    return "\n".join(lines)


def capacity(found: dict[str, list[dict]], requests: int) -> str:
    """Print a table: requests per day on one machine, and machines for `requests` per day."""
    lines = [
        f"| requests together | | requests a day | machines for {requests:,} a day |",
        "|---:|---|---:|---:|",
    ]
    for count in map(str, COUNTS):
        for name, runs in found.items():
            seconds = [statistics.median(run["requests"][count]["seconds"]) for run in runs]
            a_day = SECONDS_A_DAY * int(count) / statistics.median(seconds)
            lines.append(f"| {count} | {name} | {a_day:,.0f} | {math.ceil(requests / a_day)} |")
    return "\n".join(lines)


def _config(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text())


def _dtype(model: Path) -> str:
    config = _config(model)
    return str(config.get("torch_dtype") or config.get("dtype") or "float32")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["make", "all", "capacity", *IMPLEMENTATIONS])
    parser.add_argument("folder", type=Path, help="directory for the model and the results")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of that of `make`")
    parser.add_argument("--output", type=Path, help="file of one measurement")
    parser.add_argument(
        "--vllm", default="python", help="`all`: the Python command of vLLM's environment"
    )
    parser.add_argument("--rounds", type=int, default=2, help="`all`: rounds")
    parser.add_argument("--size", default="bench", help="`make`: as in `owl2 bench --size`")
    parser.add_argument("--dtype", default="bfloat16", help="`make`: dtype of the weights")
    parser.add_argument("--tokenizer", type=Path, help="`make`: a SentencePiece file")
    parser.add_argument("--new", type=int, default=NEW, help="tokens per answer")
    parser.add_argument("--requests", type=int, default=1_000_000, help="`capacity`: per day")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    asked = parser.parse_args()
    model = asked.model or asked.folder / "model"
    if asked.what == "make":
        make(asked.folder, asked.size, asked.dtype, asked.tokenizer)
    elif asked.what == "all":
        options = ["--new", str(asked.new), "--threads", str(asked.threads)]
        measure_all(asked.folder, model, asked.rounds, shlex.split(asked.vllm), options)
    elif asked.what == "capacity":
        found = json.loads((asked.folder / "throughput.json").read_text())
        print(capacity(found, asked.requests))
    else:
        result = measure(asked.what, model, asked.new, asked.threads)
        for count, figures in result["requests"].items():
            print(f"{asked.what}, {count} together: {figures['tokens_per_second']:.1f} tokens/s")
        if asked.output:
            asked.output.write_text(json.dumps(result))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
