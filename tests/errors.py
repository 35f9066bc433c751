"""Assertions about `InputError`s: their codes and the values that they name, not their wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from owl2.errors import ErrorCode, InputError


@contextmanager
def raises_input_error(code: ErrorCode, *needles: object) -> Iterator[pytest.ExceptionInfo]:
    """Expect an `InputError` with `code` whose message contains each of `needles` (as `str`)."""
    with pytest.raises(InputError) as caught:
        yield caught
    assert caught.value.code is code, (caught.value.code, str(caught.value))
    for needle in needles:
        assert str(needle) in str(caught.value), (needle, str(caught.value))
