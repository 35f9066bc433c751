from functools import partial

import pytest

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import (
    put,
    put_lines,
    split_skipped,
    summarize,
    summarize_all,
)
from tests.errors import raises_input_error

sharegpt = partial(read_published, "sharegpt")
slimorca = partial(read_published, "slimorca")
SHAREGPT = "ShareGPT_V3_unfiltered_cleaned_split.json"
SLIMORCA = "oo-labeled_correct.gpt4.sharegpt.jsonl"


def turns(*rounds: tuple[str, str]) -> list[dict]:
    return [{"from": name, "value": text} for name, text in rounds]


def shared(*rounds: tuple[str, str]) -> dict:
    return {"id": "QWJhYvA_0", "conversations": turns(*rounds)}


def orca(*rounds: tuple[str, str]) -> dict:
    weights = {"system": None, "human": 0.0, "gpt": 1.0}
    return {"conversations": [turn | {"weight": weights[turn["from"]]} for turn in turns(*rounds)]}


def test_sharegpt(tmp_path):
    rows = [
        shared(("human", "Hi "), ("gpt", "\n Hello"), ("human", "So?"), ("gpt", "So what?")),
        shared(("user", "1 + 1?"), ("chatgpt", "2")),
        shared(("system", "Be short."), ("human", "Hi"), ("gpt", "Hello")),
    ]
    put(tmp_path, SHAREGPT, rows)
    assert summarize_all(sharegpt(tmp_path)) == [
        (None, [("Hi", "Hello"), ("So?", "So what?")]),
        (None, [("1 + 1?", "2")]),
        (None, [("Be short.\n\nHi", "Hello")]),
    ]
    assert [sample.source for sample in split_skipped(sharegpt(tmp_path))[0]] == [
        f"{tmp_path / SHAREGPT}, row {n}" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("rounds", "reason"),
    [
        ([], "conversations without a turn"),
        ([("gpt", "Hello"), ("human", "Hi"), ("gpt", "So")], "conversations that start with an an"),
        ([("gpt", "Hello")], "conversations that start with an answer"),
        ([("system", "Be short.")], "conversations that start with an answer"),
        ([("human", "Hi")], "conversations without an answer"),
        ([("human", "Hi"), ("gpt", "")], "conversations with an empty turn"),
        ([("human", " "), ("gpt", "Hello")], "conversations with an empty turn"),
        ([("human", "Hi"), ("bing", "Hello")], "conversations with turns from 'bing'"),
        ([("human", "Hi"), ("human", "?"), ("gpt", "!")], "conversations whose turns do not alt"),
        ([("human", "Hi"), ("gpt", "?"), ("gpt", "!")], "conversations whose turns do not alt"),
        ([("human", "a"), ("system", "b"), ("gpt", "c")], "conversations whose turns do not alt"),
        (
            [("human", "what is <|image|>?"), ("gpt", "c")],
            "conversations that contain the special token <|image|>",
        ),
        (
            [("human", "strike"), ("gpt", "<s>old</s> new")],
            "conversations that contain the special token </s>",
        ),
        (
            [("system", "<s>"), ("human", "a"), ("gpt", "b")],
            "conversations that contain the special token <s>",
        ),
    ],
)
def test_unusable_conversations_are_skipped(tmp_path, rounds, reason):
    put(tmp_path, SHAREGPT, [shared(*rounds), shared(("human", "a"), ("gpt", "b"))])
    samples, skipped = split_skipped(sharegpt(tmp_path))
    assert [summarize(sample) for sample in samples] == [(None, [("a", "b")])]
    ((found, count),) = skipped.items()
    assert found.startswith(reason)
    assert count == 1


def test_a_last_turn_without_an_answer_is_removed_and_counted(tmp_path):
    rows = [shared(("human", "a"), ("gpt", "b"), ("human", "thanks")), shared(("human", "a"))]
    put(tmp_path, SHAREGPT, rows)
    samples, skipped = split_skipped(sharegpt(tmp_path))
    assert [summarize(sample) for sample in samples] == [(None, [("a", "b")])]
    assert skipped == {
        "last turns without an answer": 1,
        "conversations without an answer": 1,
    }


def test_slimorca_puts_the_system_text_before_the_user_text(tmp_path):
    rows = [
        orca(("system", "You are an AI."), ("human", "Write.\nNow"), ("gpt", "Done.")),
        orca(("system", ""), ("human", "Write"), ("gpt", "Done")),
        orca(("human", "Write"), ("gpt", "No")),
    ]
    put_lines(tmp_path, SLIMORCA, rows)
    assert summarize_all(slimorca(tmp_path)) == [
        (None, [("You are an AI.\n\nWrite.\nNow", "Done.")]),
        (None, [("Write", "Done")]),
        (None, [("Write", "No")]),
    ]


@pytest.mark.parametrize(
    ("row", "expected_error"),
    [
        ({"id": "x"}, (ErrorCode.MISSING_VALUE, "conversations")),
        ({"conversations": ["Hi"]}, (ErrorCode.INVALID_TYPE, "Hi")),
        ({"conversations": [{"from": "human"}]}, (ErrorCode.MISSING_VALUE, "value")),
        ({"conversations": [{"from": 1, "value": "x"}]}, (ErrorCode.INVALID_TYPE, "from")),
    ],
)
def test_malformed_rows_are_refused(tmp_path, row, expected_error):
    good = orca(("human", "Write"), ("gpt", "No"))
    path = put_lines(tmp_path, SLIMORCA, [good, row])
    with raises_input_error(*expected_error) as caught:
        list(slimorca(tmp_path))
    assert str(caught.value).startswith(f"{path}, line 2")
    path = put(tmp_path, SHAREGPT, [good, row])
    with raises_input_error(*expected_error) as caught:
        list(sharegpt(tmp_path))
    assert str(caught.value).startswith(f"{path}, row 2")
