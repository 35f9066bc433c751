"""An InputError knows what of a row is wrong, however often it is told again."""

import pickle

from owl2.errors import InputError


def told_again(error: InputError, *fault: str) -> InputError:
    try:
        raise InputError(f"here: {error}", *fault) from error
    except InputError as again:
        return again


def test_the_deepest_error_knows_best():
    assert InputError("x").fault == "format"
    assert told_again(InputError("x", "roles")).fault == "roles"
    assert told_again(InputError("x", "missing picture"), "broken picture").fault == (
        "missing picture"
    )
    assert told_again(InputError("x"), "broken picture").fault == "broken picture"
    assert told_again(told_again(InputError("x", "roles"))).fault == "roles"


def test_it_goes_from_process_to_process():
    error = pickle.loads(pickle.dumps(InputError("x", "roles")))
    assert (str(error), error.fault) == ("x", "roles")
