"""Runs a study: trains and evaluates each arm with each seed, and collects the scores.

::

    python recipes/study/run.py recipes/study/study.yaml            # all runs, resumed after a stop
    python recipes/study/run.py recipes/study/study.yaml --cells 2  # the next two runs
    python recipes/study/run.py recipes/study/study.yaml --list     # what is finished
    python recipes/study/run.py recipes/study/study.yaml --merge other/results.json

A cell is one run: an arm and a seed. It resumes within training (`owl2 train`) and after each of
its stages. Several processes on one machine share the cells. Files below the study's `output`:

    common/NAME-KEY/          the untrained model and the shared stages
    cells/ARM/seed-N/         the stages (run.json, log.jsonl), measures/, cell.json

"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from cells import Json, Runner, Stopped, read_json
from rich.console import Console
from rich.table import Table
from study import read_study

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text, exclusive_directory

FORMAT = 1


def collect(runner: Runner, start: Json | None, others: Iterable[Path] = ()) -> Json:
    """The results of the study: those in its file, of the cells in `output`, and of other files.

    Runs in `output` with other settings are not included.

    Raises:
        InputError: A result in `others` has other settings than the study, or than its file.
    """
    study, path = runner.study, Path(runner.study.results)
    order = list(study.cells())
    found: dict[tuple[str, int], Json] = {}
    for file in (path, *others):
        results = read_json(file) or {"cells": []}
        for cell in results["cells"]:
            name = cell["arm"], cell["seed"]
            expected = found[name]["key"] if name in found else cell["key"]
            if file != path and name in order:
                expected = runner.cell_key(*name)
            if cell["key"] != expected:
                raise InputError(
                    f"{file}: the run of {name[0]} with seed {name[1]} has other settings or data "
                    f"than those of {path}",
                    ErrorCode.CONFLICT,
                )
            found.setdefault(name, cell)
        start = start or results.get("start")
    for arm, seed in order:
        cell = read_json(runner.cell_folder(arm, seed) / "cell.json")
        if cell is not None and cell["key"] == runner.cell_key(arm, seed):
            found[arm, seed] = cell
    return {
        "format": FORMAT,
        "study": study.name,
        "settings": study.model_dump(),
        "start": start,
        # Arms that the study no longer has come last.
        "cells": [
            *(found.pop(name) for name in order if name in found),
            *(found[name] for name in sorted(found)),
        ],
    }


def write_results(runner: Runner, start: Json | None, others: Iterable[Path] = ()) -> Json:
    """Write the results file of a study, atomically."""
    results = collect(runner, start, others)
    path = Path(runner.study.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(results, indent=1) + "\n")
    return results


def pending_cells(runner: Runner) -> list[tuple[str, int]]:
    """The cells without a result, in their order.

    Raises:
        InputError: The results file contains a cell with other settings.
    """
    saved = read_json(Path(runner.study.results)) or {"cells": []}
    keys = {(cell["arm"], cell["seed"]): cell["key"] for cell in saved["cells"]}
    pending = []
    for name in runner.study.cells():
        if name not in keys:
            pending.append(name)
        elif keys[name] != runner.cell_key(*name):
            raise InputError(
                f"{runner.study.results}: the run of {name[0]} with seed {name[1]} has other "
                "settings or data. Choose another `results` file",
                ErrorCode.RESUME_MISMATCH,
            )
    return pending


def run_cells(runner: Runner, cells: Iterable[tuple[str, int]], limit: int | None) -> int:
    """Run up to `limit` cells, except those of other processes; returns their number."""
    count, began = 0, time.perf_counter()
    start = runner.run_start()
    for arm, seed in cells:
        if limit is not None and count >= limit:
            break
        with ExitStack() as stack:
            folder = runner.cell_folder(arm, seed)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(exclusive_directory(folder))
            except InputError as error:
                if error.code is not ErrorCode.CONFLICT:
                    raise
                runner.console.print(f"{arm}, seed {seed}: {error}", markup=False)
                continue
            runner.console.rule(f"{arm}, seed {seed}")
            cell = runner.run_cell(arm, seed)
        count += 1
        write_results(runner, start)
        minutes = (time.perf_counter() - began) / 60 / count
        scores = ", ".join(f"{name} {value:.4g}" for name, value in cell["metrics"].items())
        line = f"{arm}, seed {seed}: {scores} ({minutes:.1f} minutes per run)"
        runner.console.print(line, markup=False)
    return count


def status_table(runner: Runner) -> Table:
    """The finished runs of each arm."""
    table = Table("arm", "finished", "of", title=runner.study.name)
    pending = pending_cells(runner)
    for arm in runner.study.arms:
        total = runner.study.seeds_of(arm)
        missing = sum(name == arm for name, _ in pending)
        table.add_row(arm, str(total - missing), str(total))
    return table


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path, help="YAML file with the settings of a study")
    parser.add_argument("--cells", type=int, help="run at most this number of cells")
    parser.add_argument("--arms", help="only these arms, separated by commas")
    parser.add_argument("--seeds", help="only these seeds, separated by commas")
    parser.add_argument("--list", action="store_true", help="only show what is finished")
    parser.add_argument("--merge", nargs="+", type=Path, help="only add the cells of other files")
    given = parser.parse_args()
    console = Console(highlight=False)
    try:
        runner = Runner(read_study(given.study), console)
        if given.list:
            console.print(status_table(runner))
            return 0
        if given.merge:
            write_results(runner, None, given.merge)
            return 0
        arms = given.arms.split(",") if given.arms else list(runner.study.arms)
        seeds = {int(seed) for seed in given.seeds.split(",")} if given.seeds else None
        cells = [
            (arm, seed)
            for arm, seed in pending_cells(runner)
            if arm in arms and (seeds is None or seed in seeds)
        ]
        run_cells(runner, cells, given.cells)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    return 0


if __name__ == "__main__":
    sys.exit(main())
