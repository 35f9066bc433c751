import pytest

from owl2.errors import ErrorCode
from owl2.registry import Option, check_options, look_up, options_of, read_setting
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


def shapes(split, extra=1, *, seed: int = 0, prompt: str | None = None):
    raise AssertionError("only its signature is read")


def test_options_are_keyword_only_parameters():
    assert options_of(shapes) == {"seed": Option(int, 0), "prompt": Option(str | None, None)}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"extra": 3}, ErrorCode.UNKNOWN_NAME),
        ({"split": 3}, ErrorCode.UNKNOWN_NAME),
        ({"sed": 3}, ErrorCode.UNKNOWN_NAME),
        ({"seed": "3"}, ErrorCode.INVALID_TYPE),
        ({"seed": True}, ErrorCode.INVALID_TYPE),
        ({"prompt": ["a"]}, ErrorCode.INVALID_TYPE),
    ],
)
def test_names_and_types_of_options_are_checked(options, code):
    check_options("option of shapes", options_of(shapes), {"seed": 3, "prompt": None})
    with raises_input_error(code, *options):
        check_options("option of shapes", options_of(shapes), options)
