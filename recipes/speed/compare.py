"""Speed of the same decoder in owl2, transformers, vLLM, llama.cpp and OpenVINO, on a CPU.

::

    make ──► FOLDER/owl2, FOLDER/llama, FOLDER/llama.gguf: one set of random weights
    measure ──► one engine in this process ──► a JSON file
    all ──► all engines in turn for several rounds, each in its own process and environment
            ──► FOLDER/compare.md (a table of medians) and FOLDER/compare.json

Each engine answers one request, then sixteen concurrent requests, with weights of 16, 8 and 4
bits. A prompt consists of random ids, decoding is greedy, and caches across requests are off.
docs/speed.md describes how the engines are installed.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from engines import Answer, Prompts, Task

PROMPT, NEW = 129, 128  # tokens; the prompt is as long as an image and 64 words of size `bench`
COUNTS = (1, 16)  # concurrent requests
REPEATS = 3  # in a process, after one warm-up
THREADS = 2
SPECIAL = 3  # lower ids are special tokens of some tokenizers
CPU_INFO = Path("/proc/cpuinfo")
# Instructions that decide which kernels the engines use.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# Engines by the names of their files in engines/, in the order of the table.
ENGINES = (
    *("owl2", "owl2_activations8", "llamacpp", "openvino", "vllm", "transformers"),
    "transformers_compiled",
)
DEFAULT_ENGINES = ENGINES[:-1]  # compiled decode steps take many minutes on two cores
TITLES = {
    "owl2_activations8": "owl2, 8-bit activations",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO",
    "vllm": "vLLM",
}

Key = tuple[str, int]  # the name of an engine and bits


def make(folder: Path, size: str, dtype: str) -> None:
    """Write the model, and its decoder as a plain LLaMA with the same weights."""
    from engines.llamacpp import write_gguf

    from owl2.bench.presets import BenchModel
    from owl2.model.variants import as_llama

    model = BenchModel(size=size, device="cpu", dtype=dtype).load()
    model.save_pretrained(folder / "owl2")
    as_llama(model).save_pretrained(folder / "llama")
    write_gguf(folder, dtype)


def measure(name: str, task: Task, prompt: int, new: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Measure the seconds to the first tokens and to the last tokens.

    Returns:
        `engine`, `bits`, `versions`, `load_seconds`, and for each count of `requests`: `seconds`
        and `first_seconds` of each repetition; `first`, their median; `decode`, tokens/s of all
        requests after the first tokens; `answers`, the ids.
    """
    engine = import_module(f"engines.{name}")
    start = time.perf_counter()
    answer = engine.prepare(task)
    load_seconds = time.perf_counter() - start
    draw = random.Random(0)
    largest = task.config["vocab_size"] - 1
    prompts = [[draw.randint(SPECIAL, largest) for _ in range(prompt)] for _ in range(max(COUNTS))]
    return {
        "engine": name,
        "bits": task.bits,
        "versions": {package: version(package) for package in engine.PACKAGES},
        "load_seconds": load_seconds,
        "requests": {str(count): timed(answer, prompts[:count], new, repeats) for count in COUNTS},
    }


def timed(answer: Answer, prompts: Prompts, new: int, repeats: int) -> dict[str, Any]:
    """See `measure`."""
    answers = answer(prompts, new)
    if any(len(ids) != new for ids in answers):
        raise RuntimeError(f"answers of {[len(ids) for ids in answers]} tokens instead of {new}")
    first, seconds = [], []
    for _ in range(repeats):
        for times, tokens in ((first, 1), (seconds, new)):
            start = time.perf_counter()
            answer(prompts, tokens)
            times.append(time.perf_counter() - start)
    until_first = statistics.median(first)
    return {
        "seconds": seconds,
        "first_seconds": first,
        "first": until_first,
        "decode": len(prompts) * (new - 1) / (statistics.median(seconds) - until_first),
        "answers": answers,
    }


def measure_all(
    folder: Path,
    engines: Sequence[str],
    bits: Sequence[int],
    rounds: int,
    pythons: Mapping[str, Sequence[str]],
    options: Sequence[str],
    minutes: float,
) -> dict[str, Any]:
    """Run all in turn, each in its own process, and write the table.

    A measurement whose file exists is not repeated, so a run can be stopped and resumed. An engine
    that fails is skipped in later rounds, and its log is named in the result.

    Args:
        pythons: Python commands by engine; default: this one.
        options: Further options of `measure`.
        minutes: No measurement starts after this time.

    Returns:
        The content of ``compare.json``: `machine`, `runs` and `skipped`.
    """
    end = time.monotonic() + 60 * minutes
    runs: dict[Key, list[dict]] = {}
    skipped: dict[str, str] = {}
    keys = [
        (name, size)
        for size in bits
        for name in engines
        if size in import_module(f"engines.{name}").BITS
    ]
    for number in range(rounds):
        for name, size in keys:
            output = folder / f"{name}-{size}-{number}.json"
            title = f"{name}, {size} bits"
            if not output.exists() and title not in skipped:
                if time.monotonic() > end:
                    print(f"round {number + 1}, {title}: not measured yet", flush=True)
                    continue
                command = [*pythons.get(name, [sys.executable]), __file__, "measure", str(folder)]
                command += ["--engine", name, "--bits", str(size), "--output", str(output)]
                if error := _run([*command, *options], output.with_suffix(".log")):
                    skipped[title] = error
                print(f"round {number + 1}, {title}: {error or 'done'}", flush=True)
            if output.exists():
                runs.setdefault((name, size), []).append(json.loads(output.read_text()))
    found = {
        "machine": machine(),
        "runs": [run for several in runs.values() for run in several],
        "skipped": skipped,
    }
    (folder / "compare.json").write_text(json.dumps(found))
    (folder / "compare.md").write_text(table(found["runs"]) + "\n")
    return found


def _run(command: Sequence[str], log: Path) -> str | None:
    """Run a measurement; returns the reason if it failed."""
    with log.open("w") as file:
        code = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT)
    if code.returncode == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit code {code.returncode}: {lines[-1] if lines else ''} ({log})"


def machine() -> dict[str, Any]:
    """The processor and its instructions."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = info.get("flags", "").split()
    return {
        "cpu": info.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
        "threads": THREADS,
    }


def table(runs: Sequence[dict]) -> str:
    """Medians over the rounds; the best engine of each size of weights is bold.

    The last column is the mean number of first tokens that equal those of owl2 with 16 bits.
    """
    counts = [str(count) for count in COUNTS]
    titles = ["1 request" if count == "1" else f"{count} requests" for count in counts]
    columns = [f"{title}: {what}" for title in titles for what in ("first token, s", "tokens/s")]
    lines = [
        "| weights | engine | " + " | ".join([*columns, "rounds", "equal tokens"]) + " |",
        "|---|---|" + "---:|" * (len(columns) + 2),
    ]
    groups: dict[Key, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["engine"], run["bits"]), []).append(run)
    figures = {
        key: [_median(group, count, what) for count in counts for what in ("first", "decode")]
        for key, group in groups.items()
    }
    reference = groups.get(("owl2", 16), [None])[0]
    for name, bits in figures:
        rivals = [values for (_, other), values in figures.items() if other == bits]
        cells = []
        for index, value in enumerate(figures[name, bits]):
            best = (min, max)[index % 2](values[index] for values in rivals)
            cell = _format(value)
            cells.append(f"**{cell}**" if cell == _format(best) else cell)
        group = groups[name, bits]
        equal = "–" if reference is None else f"{_equal_tokens(reference, group[0]):.0f}"
        row = [f"{bits} bits", TITLES.get(name, name), *cells, str(len(group)), equal]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _format(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.2g}"


def _median(runs: Sequence[dict], count: str, what: str) -> float:
    return statistics.median(run["requests"][count][what] for run in runs)


def _equal_tokens(one: dict, other: dict) -> float:
    """The mean length of the common prefixes of the answers."""
    count = str(max(COUNTS))
    pairs = zip(*(run["requests"][count]["answers"] for run in (one, other)), strict=True)
    return statistics.mean(map(_common_prefix, pairs))


def _common_prefix(pair: tuple[list[int], list[int]]) -> int:
    """The number of first ids that are equal."""
    matches = (a == b for a, b in zip(*pair, strict=True))
    return len([*takewhile(bool, matches)])


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["make", "measure", "all"])
    parser.add_argument("folder", type=Path, help="where `make` writes the models")
    parser.add_argument("--size", default="bench", help="`make`: as in `owl2 bench --size`")
    parser.add_argument("--dtype", default="bfloat16", help="`make`: dtype of 16-bit weights")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repetitions in a process")
    parser.add_argument("--engine", choices=ENGINES, help="`measure`: the engine")
    parser.add_argument("--output", type=Path, help="`measure`: the JSON file; default: print")
    parser.add_argument("--bits", default="16,8,4", help="bits of the weights")
    parser.add_argument(
        "--engines", default=",".join(DEFAULT_ENGINES), help=f"`all`: some of {','.join(ENGINES)}"
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="ENGINE=COMMAND",
        help="`all`: the Python command of an engine's environment",
    )
    parser.add_argument("--rounds", type=int, default=3, help="`all`: rounds")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="`all`: start no measurement after this time; the same command resumes",
    )
    given = parser.parse_args()
    engines, sizes = given.engines.split(","), given.bits.split(",")
    if unknown := {*engines} - {*ENGINES} | {*sizes} - {"16", "8", "4"}:
        parser.error(f"unknown engines or bits: {', '.join(sorted(unknown))}")
    if given.what == "measure" and given.engine is None:
        parser.error("`measure` needs --engine")
    if given.what != "make" and not (given.folder / "owl2").is_dir():
        parser.error(f"{given.folder} has no models; run `compare.py make {given.folder}` first")
    bits = [int(size) for size in sizes]
    if given.what == "make":
        make(given.folder, given.size, given.dtype)
    elif given.what == "measure":
        task = Task(given.folder, bits[0], max(COUNTS), given.prompt + given.new, THREADS)
        load = os.getloadavg()[0]  # before the measurement
        result = measure(given.engine, task, given.prompt, given.new, given.repeats)
        result["load_before"] = load
        if given.output is None:
            print(json.dumps(result))
            return
        part = given.output.with_suffix(".part")  # a file that exists is complete
        part.write_text(json.dumps(result))
        part.replace(given.output)
    else:
        pythons = {
            name: shlex.split(command)
            for name, _, command in (item.partition("=") for item in given.python)
        }
        options = ["--prompt", str(given.prompt), "--new", str(given.new)]
        options += ["--repeats", str(given.repeats)]
        found = measure_all(
            given.folder, engines, bits, given.rounds, pythons, options, given.minutes
        )
        print(table(found["runs"]))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
