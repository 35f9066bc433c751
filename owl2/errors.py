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
    "lost file",
    "format",
]


class InputError(ValueError):
    """Something a user gave is wrong.

    The message says what was wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with 2; a library caller may catch it as a ``ValueError``.
    ``fault``: what of a row of data is wrong, for who counts such rows.
    """

    def __init__(self, message: str = "", fault: Fault = "format") -> None:
        super().__init__(message)
        self._fault: Fault = fault

    @property
    def fault(self) -> Fault:
        """That of the error it was raised from, which knew more; else as given."""
        deeper = self.__cause__.fault if isinstance(self.__cause__, InputError) else "format"
        return self._fault if deeper == "format" else deeper
