"""`InputError`: its code and its message survive re-raising and pickling."""

import pickle

import pytest

from owl2.errors import ErrorCode, InputError, require_package
from tests.errors import raises_input_error


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


def test_a_folder_is_not_an_optional_package(tmp_path, monkeypatch):
    (tmp_path / "not_installed_anywhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "not_installed_anywhere", "extra"):
        require_package("not_installed_anywhere", "A test", "extra")
    require_package("torch", "A test", "extra")
