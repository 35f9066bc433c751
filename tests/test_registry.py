import pytest

from owl2.errors import InputError
from owl2.registry import check_options, look_up, options_of, read_setting


def test_finds():
    assert look_up("number", "two", {"one": 1, "two": 2}) == 2


def test_names_the_nearest_and_all():
    with pytest.raises(InputError) as caught:
        look_up("number", "tow", {"two": 2, "one": 1})
    assert str(caught.value) == "'tow' is no number. Do you mean 'two'? There are: one, two."


@pytest.mark.parametrize("name", [3, True, ["zzz"], "zzz"])
def test_anything_else_is_refused_without_a_guess(name):
    with pytest.raises(InputError, match=r"is no number\. There are: one\."):
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
def test_what_is_no_setting(text):
    with pytest.raises(InputError, match=r"must have the form option=value|cannot be read"):
        read_setting(text)


def test_options_are_what_only_a_keyword_can_give():
    def shapes(split, extra=1, *, seed=0, prompt=None):
        raise AssertionError("only looked at")

    assert options_of(shapes) == {"seed": 0, "prompt": None}
    check_options("option of shapes", shapes, {"seed": 3})
    for other in ("extra", "split", "sed"):
        with pytest.raises(InputError, match=f"'{other}' is no option of shapes"):
            check_options("option of shapes", shapes, {other: 3})
