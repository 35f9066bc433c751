"""The command `owl2`: parses, calls one function a command, prints.

torch and transformers take seconds to import, so each command imports what it needs when it runs.
"""

import sys
from typing import Annotated

import typer
from rich.console import Console

from owl2 import __version__
from owl2.errors import InputError

app = typer.Typer(
    name="owl2",
    help="mPLUG-Owl2: ask about pictures, train, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"owl2 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


@app.command("version")
def show_version() -> None:
    """Say the version."""
    _print_version(True)


def main() -> None:
    """Run the command line.

    It ends with exit code 0, with 2 where the user's input was wrong (then the last line on stderr
    says what), and with 130 on Ctrl-C; the latter and wrong usage are typer's own doing.
    """
    try:
        app()
    except InputError as error:
        _complain(str(error))
        sys.exit(2)


def _complain(message: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False)
