"""The one exception that means: something the user gave is wrong."""


class InputError(ValueError):
    """Something a user gave is wrong.

    The message says what was wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with 2; a library caller may catch it as a ``ValueError``.
    """
