"""Forks of the test process: they import nothing again, unlike subprocesses."""

import os
import warnings


def run_in_fork(function, *args):
    """Call `function` in a fork; returns its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads
        child = os.fork()
    if not child:
        try:
            function(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
