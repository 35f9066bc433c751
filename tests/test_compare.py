"""recipes/speed/compare.py: equal answers of the implementations, and the table."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "speed" / "compare.py"
PROMPTS = [[5, 9, 200, 31], [77, 300, 4, 4]]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(compare, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    compare.make(path, "tiny", "float32")
    return path


def test_ours_and_transformers_answer_the_same(compare, folder):
    ours = compare.ours(folder)(PROMPTS, 12)
    assert [len(ids) for ids in ours] == [12, 12]
    assert ours == compare.transformers(folder)(PROMPTS, 12)


def test_short_answers_are_not_measured(compare):
    with pytest.raises(RuntimeError, match="instead of 3"):
        compare._timed(lambda prompts, new: [[1]] * len(prompts), PROMPTS, 3)


def test_table(compare):
    def run(rate, answers):
        figures = {"tokens_per_second": rate, "decode_tokens_per_second": 2 * rate}
        figures |= {"first_seconds": [0.5], "answers": answers}
        return {"requests": {str(count): figures for count in compare.COUNTS}}

    found = {"ours": [run(10, [[1, 2, 3]]), run(30, [[1, 2, 3]])], "other": [run(5, [[1, 2, 4]])]}
    lines = compare.table(found).splitlines()
    assert lines[2] == "| ours | 1 | 20.0 | 10.0 30.0 | 1.00 | 40.0 | 0.50 | 3 |"
    assert lines[3] == "| other | 1 | 5.0 | 5.0 | 0.25 | 10.0 | 0.50 | 2 |"
