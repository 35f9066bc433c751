import pytest

from owl2.data.sample import Sample, validated
from owl2.errors import InputError

IMAGE = {"type": "image", "path": "not opened.png"}


def talk(*contents) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    "messages",
    [
        talk("hello", "hi"),
        talk([IMAGE], "a red circle."),
        talk([IMAGE, IMAGE, {"type": "text", "text": "same?"}], "no", "sure?", "yes"),
    ],
)
def test_good_samples_pass_as_they_are(messages):
    sample = Sample(messages, "here")
    assert validated(sample) is sample


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "empty"),
        (talk("hello"), "no answer to learn"),
        (talk("hello", "hi", "and?"), "no answer to learn"),
        ([{"role": "assistant", "content": "hi"}], "'user' is due"),
        (talk("<|image|>what?", "hm"), "marks 1 images, and 0 come"),
        (talk([{"type": "image"}], "hm"), "marks 1 images, and 0 come"),
        (talk([{"type": "sound"}], "hm"), "part 0"),
    ],
)
def test_bad_samples_say_where_they_came_from(messages, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        validated(Sample(messages, "talks.jsonl:17"))
    assert str(caught.value).startswith("talks.jsonl:17: ")


def test_half_of_a_character_is_no_text():
    messages = [{"role": "user", "content": "hi \ud83d"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(InputError, match=r"row 1: .*half of a character"):
        validated(Sample(messages, "row 1"))
