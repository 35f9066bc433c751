"""Offline inference gives the answers of the `Engine`, and errors for invalid conversations."""

import pytest

from owl2.errors import ErrorCode, InputError
from tests.errors import raises_input_error
from tests.vllm_plugin.conftest import NEW, STEP, ask, conversations, random_image

pytestmark = pytest.mark.vllm

SETTINGS = {"dtype": "float32", "max_num_batched_tokens": STEP, "max_num_seqs": 16}


def test_answers_equal_the_engine_and_errors_keep_their_order(checkpoint, engine, tmp_path):
    from owl2.vllm_plugin.offline import answer_all

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    large = random_image(9, size=(900, 20))
    many = [
        *conversations(),
        ask("what?", tmp_path / "broken.png"),
        ask("what?", tmp_path / "missing.png"),
        ask("<|image|>"),
        ask("too long " * 100),
        ask("and a large one?", large),
    ]
    answers = list(
        answer_all(checkpoint, iter(many), {"max_new_tokens": NEW}, window=8, **SETTINGS)
    )
    assert [i for i, answer in enumerate(answers) if isinstance(answer, InputError)] == [
        16, 17, 18, 19,
    ]  # fmt: skip
    good = [*conversations(), many[-1]]
    expected = [engine.chat(messages, max_new_tokens=NEW) for messages in good]
    assert [answer for answer in answers if isinstance(answer, str)] == expected


def test_an_invalid_option_is_an_error_before_loading(checkpoint):
    from owl2.vllm_plugin.offline import answer_all

    with raises_input_error(ErrorCode.INVALID_VALUE, "temperature"):
        next(answer_all(checkpoint, [], {"temperature": -1.0}))
