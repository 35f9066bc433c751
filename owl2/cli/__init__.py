"""The command `owl2`: parses, calls one function a command, prints.

Importing the package registers the model with transformers, which takes seconds; each command
imports the further rooms that it needs when it runs. Here are what holds for all commands and the
exit codes; the commands are in the files beside this one.
"""

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from owl2 import __version__
from owl2.cli import bench, chat, data, eval, images, serve, train
from owl2.errors import InputError

app = typer.Typer(
    name="owl2",
    help="mPLUG-Owl2: ask about images, train, evaluate.",
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


# Those without a name are the command's own.
app.add_typer(chat.app)
app.add_typer(train.app)
app.add_typer(data.app, name="data")
app.add_typer(eval.app, name="eval")
app.add_typer(bench.app)
app.add_typer(serve.app)
app.add_typer(images.app)


def main() -> None:
    """Run the command line.

    It ends with exit code 0, with 2 where the user's input was wrong (then the last line on stderr
    says what), with 130 on Ctrl-C and, from `owl2 train`, 143 on SIGTERM; Ctrl-C elsewhere and
    wrong usage are typer's own doing.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a bar in a log file is no help
    # Where it is installed, it is imported in every training and advises of further packages.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(prog_name="owl2")
    except InputError as error:
        _complain(str(error))
        sys.exit(2)


def _complain(message: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False)
