"""The tables of `report.py`, in Markdown."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from paired import (
    LEVEL,
    PairedDifference,
    detectable_difference,
    holm,
    interval,
    p_value,
    paired_difference,
)

from owl2.errors import ErrorCode, InputError

NOT_RUN = "not run"
IMAGE_SCORES = "choice", "answer_nll"  # the most precise ones
Scores = dict[str, dict[str, dict[int, float]]]  # metric, arm, seed
Json = dict[str, Any]


def scores_of(results: Json) -> Scores:
    """The scores by metric, arm and seed.

    ``log_perplexity`` is derived from ``perplexity``: differences of its logarithm are relative
    ones. ``choice, text K and V`` and ``exact, text K and V`` are those after replacing the visual
    keys and values.
    """
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    for cell in results["cells"]:
        metrics = dict(cell["metrics"])
        if "perplexity" in metrics:
            metrics["log_perplexity"] = math.log(metrics["perplexity"])
        replaced = cell.get("replaced", {})
        metrics |= {f"{name}, text K and V": value for name, value in replaced.items()}
        for name, value in metrics.items():
            scores[name][cell["arm"]][cell["seed"]] = value
    return scores


def score_table(results: Json) -> str:
    """Each score: its mean for each arm with the half width of its 95 % interval, in Markdown."""
    scores, arms = scores_of(results), finished_arms(results)
    start = (results.get("start") or {}).get("metrics", {})
    counts = {arm: sum(cell["arm"] == arm for cell in results["cells"]) for arm in arms}
    head, rows = ["score"], [["runs"]]
    rows += [[name] for name in scores if name != "log_perplexity"]
    if start:
        head.append("before stage 2")
        rows[0].append("1")
        for row in rows[1:]:
            row.append(_number(start.get(row[0])))
    for arm in arms:
        head.append(title_of(results, arm))
        rows[0].append(str(counts[arm]))
        for row in rows[1:]:
            row.append(_mean(list(scores[row[0]].get(arm, {}).values())))
    return markdown_table(head, rows)


def difference_table(results: Json) -> str:
    """Each score: the paired difference of each arm from the baseline, in Markdown."""
    found = {arm: values for arm, values in differences(results) if values}
    counts = [max(value.count for value in values.values()) for values in found.values()]
    rows = [["pairs", *map(str, counts)]]
    for name in scores_of(results):
        if any(name in values for values in found.values()):
            rows.append([name, *(_difference(values.get(name)) for values in found.values())])
    return markdown_table(["score", *(title_of(results, arm) for arm in found)], rows)


def clear_differences(results: Json) -> list[str]:
    """For each arm with several pairs, the scores that differ also after Holm's correction.

    A list in Markdown.
    """
    lines = []
    for arm, values in differences(results):
        # The perplexity is tested by its logarithm.
        tested = {name: p_value(value) for name, value in values.items() if name != "perplexity"}
        adjusted = holm(tested)
        if adjusted:
            clear = [f"{name} (p = {p:.2g})" for name, p in adjusted.items() if p < 1 - LEVEL]
            found = ", ".join(clear) or "none"
            lines.append(f"- {title_of(results, arm)}, of {len(adjusted)} scores: {found}")
    return lines


def category_table(results: Json) -> str:
    """Each score by category of the questions: mean of each arm with its interval, in Markdown."""
    cells, start = results["cells"], (results.get("start") or {}).get("categories", {})
    arms = finished_arms(results)
    names = {
        (score, category): None
        for found in (start, *(cell.get("categories", {}) for cell in cells))
        for score, values in found.items()
        for category in values
    }
    rows = []
    for score, category in names:
        row = [f"{score}, {category}", _number(start.get(score, {}).get(category))]
        for arm in arms:
            own = [
                cell.get("categories", {}).get(score, {}) for cell in cells if cell["arm"] == arm
            ]
            values = [found[category] for found in own if category in found]
            row.append(_mean(values))
        rows.append(row)
    titles = [title_of(results, arm) for arm in arms]
    return markdown_table(["score, category", "before stage 2", *titles], rows) if rows else ""


def power_table(results: Json) -> str:
    """The smallest difference that is found with a probability of 80 %, in Markdown.

    For the assumed standard deviation, which is stated in the study, and the observed one with
    the largest number of pairs.
    """
    settings = results["settings"]
    main, others = settings["main_seeds"], settings["seeds"]
    counts = sorted(
        {count for count in (others, main if settings["main"] else others) if count > 1}
    )
    rows = []
    observed = observed_sds(results)
    for name, sd in settings["expected_sd"].items():
        cells = [f"{detectable_difference(sd, count):.3f}" for count in counts]
        seen = [NOT_RUN, NOT_RUN]
        if name in observed and counts:
            found = detectable_difference(observed[name], counts[-1])
            seen = [f"{observed[name]:.2g}", f"{found:.2g}"]
        rows.append([name, f"{sd:g}", *cells, *seen])
    heads = [f"detectable, {count} pairs" for count in counts]
    last = ["observed SD", "detectable with it"]
    return markdown_table(["score", "assumed SD", *heads, *last], rows)


def agreement_table(results: Json, other: Json) -> str:
    """The differences of two studies, and whether the first one's interval admits the other's sign.

    In Markdown, for the arms and the scores that both have.
    """
    rows = [
        [
            f"{title_of(results, arm)}, {name}",
            _difference(value),
            _difference(reference),
            "yes" if admits_sign(value, reference.mean) else "no",
        ]
        for arm, name, value, reference in _common_differences(results, other)
    ]
    return markdown_table(["arm, score", results["study"], other["study"], "sign agrees"], rows)


def main_disagreements(results: Json, other: Json) -> list[str]:
    """The scores of images of the main arms whose intervals do not overlap.

    An interval without width is ignored: two pairs of a share can differ by the same value.

    Raises:
        InputError: No main arm has such a score in both studies.
    """
    found = [
        (f"{title_of(results, arm)}, {name}", value, reference)
        for arm, name, value, reference in _common_differences(results, other)
        if arm in results["settings"]["main"] and name in IMAGE_SCORES
    ]
    if not found:
        raise InputError(
            f"The studies have no common main arm with {' or '.join(IMAGE_SCORES)}.",
            ErrorCode.MISSING_VALUE,
        )
    return [
        label
        for label, value, reference in found
        if value.sd > 0 and (value.low > reference.high or value.high < reference.low)
    ]


def _common_differences(
    results: Json, other: Json
) -> Iterator[tuple[str, str, PairedDifference, PairedDifference]]:
    """The arms and the scores that both studies have, with their differences."""
    found = dict(differences(other))
    for arm, values in differences(results):
        for name, value in values.items():
            if (reference := found.get(arm, {}).get(name)) is not None:
                yield arm, name, value, reference


def admits_sign(difference: PairedDifference, reference: float) -> bool:
    """Whether an interval, or the mean of one pair, admits the sign of a reference."""
    if math.isnan(difference.low):
        return difference.mean * reference >= 0
    return difference.high >= 0 if reference >= 0 else difference.low <= 0


def observed_sds(results: Json) -> dict[str, float]:
    """The standard deviation of the paired difference of each score, the median over the arms."""
    by_metric = defaultdict(list)
    for _, values in differences(results):
        for name, value in values.items():
            if value.count > 2:
                by_metric[name].append(value.sd)
    return {name: statistics.median(sds) for name, sds in by_metric.items()}


def differences(results: Json) -> Iterator[tuple[str, dict[str, PairedDifference]]]:
    """For each arm but the baseline, the difference from the baseline in each score."""
    settings, scores = results["settings"], scores_of(results)
    for arm in settings["arms"]:
        if arm != settings["baseline"]:
            found = {}
            for name, by_arm in scores.items():
                value = paired_difference(by_arm.get(arm, {}), by_arm.get(settings["baseline"], {}))
                if value is not None:
                    found[name] = value
            yield arm, found


def finished_arms(results: Json) -> list[str]:
    """The arms with at least one run, in the order of the study."""
    arms = {cell["arm"] for cell in results["cells"]}
    return [arm for arm in results["settings"]["arms"] if arm in arms]


def title_of(results: Json, arm: str) -> str:
    """The title of an arm."""
    return str(results["settings"]["arms"][arm]["title"] or arm)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:.3f}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return NOT_RUN
    mean, half_width, _ = interval(values)
    return f"{mean:.3f}" + ("" if math.isnan(half_width) else f" ± {half_width:.3f}")


def _difference(value: PairedDifference | None) -> str:
    if value is None:
        return NOT_RUN
    text = f"{value.mean:+.3f}"
    return text if math.isnan(value.low) else f"{text} ({value.low:+.3f} to {value.high:+.3f})"
