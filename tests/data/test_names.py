import pytest

from owl2.data.names import look_up
from owl2.errors import InputError


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
