"""The speed of easy-VQA's test questions in batches and one by one; the answers are equal.

::

    python recipes/speed/questions.py --model runs/demo/model

Each engine is new and has no prefix cache (`enable_prefix_caching=False`), so that both ways are
comparable: a second question about an image costs as much as the first.
"""

import argparse
import time
from collections.abc import Sequence

from rich.progress import track

from owl2 import Engine
from owl2.eval.tasks import find_tasks

SLICE = 512  # questions, before the other way has its turn


def main() -> None:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--reuse", action="store_true", help="keep features, keys and values")
    given = parser.parse_args()
    [task] = find_tasks("easy_vqa")
    questions, _ = task.read(task.data(None, "short"))
    asked = [question.messages for question in questions[: given.limit]]
    options = {"do_sample": False, "max_new_tokens": task.config.max_new_tokens}
    together = Engine.from_pretrained(given.model, "cpu", enable_prefix_caching=given.reuse)
    alone = Engine.from_pretrained(given.model, "cpu", enable_prefix_caching=given.reuse)
    seconds, answers = {1: 0.0, given.batch_size: 0.0}, {1: [], given.batch_size: []}
    for first in track(range(0, len(asked), SLICE), "asking in turn"):
        for engine, size in ((together, given.batch_size), (alone, 1)):
            began = time.perf_counter()
            answers[size] += answered(engine, asked[first : first + SLICE], size, options)
            seconds[size] += time.perf_counter() - began
    differ = sum(one != other for one, other in zip(*answers.values(), strict=True))
    for size, took in seconds.items():
        print(f"{size:>4} at a time: {took:6.1f} s, {len(asked) / took:6.1f} questions/s")
    print(f"{seconds[1] / seconds[given.batch_size]:.2f} times; {differ} answers differ")


def answered(engine: Engine, asked: Sequence, size: int, options: dict) -> list[str]:
    """The answers, `size` questions at a time."""
    answers: list[str] = []
    for first in range(0, len(asked), size):
        answers += engine.batch(asked[first : first + size], **options)
    return answers


if __name__ == "__main__":
    main()
