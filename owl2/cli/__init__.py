"""The command `owl2`, one file per command.

A command imports its implementation when it runs. The command line itself needs only typer, so
help, versions and usage errors appear without delay. Exit codes: 0 success, 2 an error in the
user's input (`InputError`), 130 Ctrl-C, 143 SIGTERM during `owl2 train`.
"""

import errno
import io
import logging
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from owl2 import __version__
from owl2.cli import data, eval
from owl2.cli.attend import attend
from owl2.cli.bench import bench
from owl2.cli.caption import caption
from owl2.cli.chat import chat
from owl2.cli.export import export
from owl2.cli.info import info
from owl2.cli.init import init
from owl2.cli.merge import merge
from owl2.cli.options import command
from owl2.cli.plan import plan
from owl2.cli.quantize import quantize
from owl2.cli.rate import rate
from owl2.cli.serve import serve, web
from owl2.cli.train import train
from owl2.errors import ErrorCode, InputError

app = typer.Typer(
    name="owl2",
    help="mPLUG-Owl2: chat about images, train, evaluate, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"owl2 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command("version")
def show_version() -> None:
    """Print the version and exit."""
    _print_version(True)


for function in (
    chat,
    init,
    info,
    plan,
    train,
    merge,
    quantize,
    export,
    bench,
    serve,
    web,
    attend,
    caption,
    rate,
):
    app.command()(command(function))
app.add_typer(data.app, name="data")
app.add_typer(eval.app, name="eval")


def main() -> None:
    """Run the command line; the exit codes are in the docstring of this module."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are not UTF-8
    if not sys.stderr.isatty():
        # No progress bars in log files. transformers reads the variable when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:
            sys.modules["transformers"].utils.logging.disable_progress_bar()
    # peft imports bitsandbytes, which logs advice on every import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if sys.platform == "win32":
            raise InputError(
                "owl2 runs on Linux and macOS. On Windows, use WSL (`wsl --install`).",
                ErrorCode.UNSUPPORTED,
            )
        try:
            app(prog_name="owl2")
        finally:
            sys.stdout.flush()  # here its error can be handled
    except InputError as error:
        _exit_with_error(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if error.filename is None:  # the log; without this, Python fails again when it flushes it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _exit_with_error(f"{error.filename or 'The output'} cannot be written: {error.strerror}")


def _exit_with_error(message: str) -> NoReturn:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False)
    sys.exit(2)
