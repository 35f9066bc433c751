"""Many conversations through vLLM: the Engine's answers, and what cannot be asked in its place."""

import pytest

from tests.vllm_plugin.conftest import NEW, STEP, ask, conversations, image

pytestmark = pytest.mark.vllm

SMALL = {"dtype": "float32", "max_num_batched_tokens": STEP, "max_num_seqs": 16}


def test_answers_are_the_engines_and_faults_are_in_their_places(checkpoint, engine, tmp_path):
    from owl2.errors import InputError
    from owl2.vllm_plugin.offline import answer_all

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    large = image(9, size=(900, 20))
    many = [
        *conversations(),
        ask("what?", tmp_path / "broken.png"),
        ask("what?", tmp_path / "not there.png"),
        ask("<|image|>"),
        ask("too long " * 100),
        ask("and a large one?", large),
    ]
    answers = list(answer_all(checkpoint, iter(many), {"max_new_tokens": NEW}, window=8, **SMALL))
    assert [i for i, answer in enumerate(answers) if isinstance(answer, InputError)] == [
        16, 17, 18, 19,
    ]  # fmt: skip
    good = [*conversations(), many[-1]]
    expected = [engine.chat(messages, max_new_tokens=NEW) for messages in good]
    assert [answer for answer in answers if isinstance(answer, str)] == expected


def test_an_option_that_is_out_of_its_range_is_said_before_anything_is_loaded(checkpoint):
    from owl2.errors import InputError
    from owl2.vllm_plugin.offline import answer_all

    with pytest.raises(InputError, match="temperature"):
        next(answer_all(checkpoint, [], {"temperature": -1.0}))
