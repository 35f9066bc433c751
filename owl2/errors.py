"""The one exception that means: something the user gave is wrong."""

from typing import Literal

# What can be wrong with a row of data, in the words of the table that counts it.
Fault = Literal[
    "missing picture",
    "broken picture",
    "huge picture",
    "placeholder count",
    "roles",
    "empty turn",
    "not a string",
    "too long",
    "nothing to learn",
    "format",
]


class InputError(ValueError):
    """Something a user gave is wrong.

    The message says what was wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with 2; a library caller may catch it as a ``ValueError``.
    ``fault``: what of a row of data is wrong, for who counts such rows.
    """

    def __init__(self, message: str = "", fault: Fault | None = None) -> None:
        super().__init__(message)
        self._fault = fault

    @property
    def fault(self) -> Fault:
        """As given, else that of the error it was raised from, else "format"."""
        if self._fault is None and isinstance(self.__cause__, InputError):
            return self.__cause__.fault
        return self._fault or "format"
