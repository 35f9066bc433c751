"""Compares the scores of `owl2 rate` with the opinion scores of a table.

    python recipes/scoring/distortions/agreement.py scores.jsonl mos.csv

Prints SRCC and PLCC (after the fit of a logistic function with four parameters), in total and by
distortion, and the distances of the distributions (Kullback-Leibler, Jensen-Shannon, Wasserstein).
"""

import csv
import json
import sys
from pathlib import Path

from owl2.data.soft_labels import OpinionRange, OpinionScore
from owl2.scoring.agreement import distribution_distance, fit_logistic, score_agreement


def main(scores: Path, table: Path) -> None:
    """Print the agreement of the images in both files, and write it next to `scores`."""
    with table.open(encoding="utf-8") as file:
        opinions = {(table.parent / row["image"]).resolve(): row for row in csv.DictReader(file)}
    found = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]
    rows = [(one, opinions[Path(one["image"]).resolve()]) for one in found]
    predicted = [one["score"] for one, _ in rows]
    truth = [OpinionScore(float(row["mos"]), float(row["std"])) for _, row in rows]
    span = OpinionRange.of(OpinionScore(float(row["mos"]), 0) for row in opinions.values())
    mos = [score.mos for score in truth]
    total = score_agreement(fit_logistic(predicted, mos), mos)
    results = {"images": len(rows), "SRCC": total.srcc, "PLCC": total.plcc}
    for kind in sorted({row["distortion"] for _, row in rows}):
        kept = [i for i, (_, row) in enumerate(rows) if row["distortion"] == kind]
        part = [predicted[i] for i in kept], [mos[i] for i in kept]
        results[f"SRCC {kind}"] = score_agreement(*part).srcc
    normal = [span.normalize(score) for score in truth]
    distance = distribution_distance(
        [score.mos for score in normal],
        [score.std for score in normal],
        predicted,
        [one["std"] for one, _ in rows],
    )
    results |= {"KL": distance.kl, "JS": distance.js, "Wasserstein": distance.wasserstein}
    for name, value in results.items():
        print(f"{name:16} {value:.4g}")
    scores.with_suffix(".agreement.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
