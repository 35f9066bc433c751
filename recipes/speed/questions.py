"""The speed of easy-VQA's test questions in batches and one by one; the answers are equal.

::

    python recipes/speed/questions.py --model runs/demo/model

Each engine is new and has no prefix cache (`enable_prefix_caching=False`), so that both
measurements are comparable: a second question about an image costs as much as the first.
"""

import argparse
import time
from collections.abc import Sequence

from rich.progress import track

from owl2 import Engine
from owl2.eval.tasks import find_tasks

SLICE = 512  # questions per measurement; the two engines alternate


def main() -> None:
    """Measure both engines, compare their answers, and print the speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="number of questions")
    parser.add_argument("--reuse", action="store_true", help="enable prefix caching")
    given = parser.parse_args()
    [task] = find_tasks("easy_vqa")
    questions, _ = task.read(task.data(None, "short"))
    conversations = [question.messages for question in questions[: given.limit]]
    options = {"do_sample": False, "max_new_tokens": task.config.max_new_tokens}
    batched = Engine.from_pretrained(given.model, "cpu", enable_prefix_caching=given.reuse)
    single = Engine.from_pretrained(given.model, "cpu", enable_prefix_caching=given.reuse)
    seconds, answers = {1: 0.0, given.batch_size: 0.0}, {1: [], given.batch_size: []}
    for first in track(range(0, len(conversations), SLICE), "measuring"):
        for engine, size in ((batched, given.batch_size), (single, 1)):
            slice_ = conversations[first : first + SLICE]
            start = time.perf_counter()
            answers[size] += generate(engine, slice_, size, options)
            seconds[size] += time.perf_counter() - start
    differ = sum(one != other for one, other in zip(*answers.values(), strict=True))
    for size, duration in seconds.items():
        speed = len(conversations) / duration
        print(f"{size:>4} at a time: {duration:6.1f} s, {speed:6.1f} questions/s")
    print(f"{seconds[1] / seconds[given.batch_size]:.2f} times; {differ} answers differ")


def generate(engine: Engine, conversations: Sequence, size: int, options: dict) -> list[str]:
    """The answers, `size` questions at a time."""
    answers: list[str] = []
    for first in range(0, len(conversations), size):
        answers += engine.batch(conversations[first : first + size], **options)
    return answers


if __name__ == "__main__":
    main()
