"""Options and start-up that `owl2 serve` and `owl2 web` share."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from owl2.errors import ErrorCode, InputError

LimitWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[LIMIT=VALUE]...",
        help="Of requests, such as images=4 or queue=1000; docs/serving.md lists them.",
        show_default=False,
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all, for other machines.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
KeyVariable = Annotated[
    str | None, typer.Option(help="The environment variable with the API keys, commas between.")
]
KeyFile = Annotated[Path | None, typer.Option(help="The file with the API keys, one a line.")]


def start_server(command: str, model: str, **options: Any) -> NoReturn:
    try:
        from owl2.serve.launch import Command, serve_model
    except ModuleNotFoundError as error:
        raise _needs_extra(command, error.name) from error
    # It takes seconds to be imported, and is so only when the page is made.
    if options["web"] and find_spec("gradio") is None:
        raise _needs_extra(command, "gradio")
    raise typer.Exit(serve_model(Command(model, **options)))


def _needs_extra(command: str, package: str | None) -> InputError:
    return InputError(
        f"owl2 {command} needs the package {package}: pip install 'owl2-vlm[serve]'.",
        ErrorCode.MISSING_DEPENDENCY,
    )
