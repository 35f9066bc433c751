import pytest

from owl2.data.sample import Sample, validated
from owl2.errors import ErrorCode
from tests.errors import raises_input_error

IMAGE = {"type": "image", "path": "not opened.png"}


def conversation(*contents) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    "messages",
    [
        conversation("hello", "hi"),
        conversation([IMAGE], "a red circle."),
        conversation([IMAGE, IMAGE, {"type": "text", "text": "same?"}], "no", "sure?", "yes"),
    ],
)
def test_valid_samples_are_returned_unchanged(messages):
    sample = Sample(messages, "here")
    assert validated(sample) is sample


@pytest.mark.parametrize(
    ("messages", "expected_error"),
    [
        ([], (ErrorCode.EMPTY_MESSAGE,)),
        (conversation("hello"), (ErrorCode.INVALID_ROLE,)),
        (conversation("hello", "hi", "and?"), (ErrorCode.INVALID_ROLE,)),
        ([{"role": "assistant", "content": "hi"}], (ErrorCode.INVALID_ROLE, "user")),
        (conversation("<|image|>what?", "hm"), (ErrorCode.IMAGE_COUNT_MISMATCH, "1")),
        (conversation([{"type": "image"}], "hm"), (ErrorCode.IMAGE_COUNT_MISMATCH, "1")),
        (conversation([{"type": "sound"}], "hm"), (ErrorCode.UNKNOWN_NAME, "0")),
    ],
)
def test_errors_start_with_the_source(messages, expected_error):
    with raises_input_error(*expected_error) as caught:
        validated(Sample(messages, "chat.jsonl:17"))
    assert str(caught.value).startswith("chat.jsonl:17: ")


def test_a_lone_surrogate_is_refused():
    messages = [{"role": "user", "content": "hi \ud83d"}, {"role": "assistant", "content": "a"}]
    with raises_input_error(ErrorCode.INVALID_FORMAT, "1"):
        validated(Sample(messages, "row 1"))
