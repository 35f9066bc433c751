"""`InputError`: its code and its message survive re-raising and pickling."""

import pickle

import pytest

from owl2.errors import ErrorCode, InputError


def test_the_code_is_passed_on_explicitly():
    with pytest.raises(InputError) as caught:
        try:
            raise InputError("x", ErrorCode.INVALID_ROLE)
        except InputError as error:
            raise InputError(f"row 3: {error}", error.code) from error
    assert caught.value.code is ErrorCode.INVALID_ROLE
    assert str(caught.value) == "row 3: x"


def test_an_error_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(InputError("x", ErrorCode.INVALID_ROLE)))
    assert (str(error), error.code) == ("x", ErrorCode.INVALID_ROLE)
