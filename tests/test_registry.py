import pytest

from owl2.errors import ErrorCode
from owl2.registry import check_options, look_up, options_of, read_setting
from tests.errors import raises_input_error


def test_look_up_returns_the_entry():
    assert look_up("number", "two", {"one": 1, "two": 2}) == 2


def test_unknown_names_are_reported_with_suggestions():
    with raises_input_error(ErrorCode.UNKNOWN_NAME) as caught:
        look_up("number", "tow", {"two": 2, "one": 1})
    assert all(name in str(caught.value) for name in ("'tow'", "'two'", "one, two"))


@pytest.mark.parametrize("name", [3, True, ["zzz"], "zzz"])
def test_unknown_names_without_similar_ones_get_no_suggestion(name):
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "number"):
        look_up("number", name, {"one": 1})


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("seed=3", ("seed", 3)),
        ("read=true", ("read", True)),
        ("refs=refs(umd).p", ("refs", "refs(umd).p")),
        ("prompt=a=b", ("prompt", "a=b")),
        ("file=", ("file", None)),
    ],
)
def test_settings_are_read_as_yaml(text, read):
    assert read_setting(text) == read


@pytest.mark.parametrize("text", ["seed", "=3", "", "seed=[3"])
def test_invalid_settings_are_refused(text):
    with raises_input_error(ErrorCode.INVALID_FORMAT):
        read_setting(text)


def test_options_are_keyword_only_parameters():
    def shapes(split, extra=1, *, seed=0, prompt=None):
        raise AssertionError("only looked at")

    assert options_of(shapes) == {"seed": 0, "prompt": None}
    check_options("option of shapes", shapes, {"seed": 3})
    for other in ("extra", "split", "sed"):
        with raises_input_error(ErrorCode.UNKNOWN_NAME):
            check_options("option of shapes", shapes, {other: 3})
