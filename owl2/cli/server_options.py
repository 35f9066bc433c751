"""Options and start-up that `owl2 serve` and `owl2 web` share."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from owl2.errors import ErrorCode, InputError
from owl2.serve.config import ServerConfig, ServerLimits

Host = Annotated[str, typer.Option(help="Listen address; 0.0.0.0 accepts other machines.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 selects a free one.")]
ModelName = Annotated[
    str | None, typer.Option(help="Name of the model in the API. [default: the directory's name]")
]
KeyVariable = Annotated[
    str | None, typer.Option(help="Environment variable with API keys, separated by commas.")
]
KeyFile = Annotated[Path | None, typer.Option(help="File with API keys, one per line.")]
ShutdownTimeout = Annotated[
    float, typer.Option(min=0, help="Seconds for unfinished requests after SIGTERM or Ctrl-C.")
]


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `limits` of a command by an option per field of `ServerLimits`."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        limits = ServerLimits(
            **{limit.name: options.pop(limit.name) for limit in fields(ServerLimits)}
        )
        command(limits=limits, **options)

    signature = inspect.signature(command)
    parameters = [one for one in signature.parameters.values() if one.name != "limits"]
    for limit in fields(ServerLimits):
        option = typer.Option(
            f"--{limit.name.replace('_', '-')}",
            help=limit.metadata["help"],
            rich_help_panel="Limits (bytes and seconds)",
        )
        parameters.append(
            inspect.Parameter(
                limit.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=limit.default,
                annotation=Annotated[limit.type, option],
            )
        )
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # functions accept it
    return run


def start_server(command: str, config: ServerConfig) -> NoReturn:
    """Serve until a signal arrives, then exit with the server's exit code.

    Raises:
        InputError: An option or the checkpoint is invalid, or the extra is not installed.
    """
    try:
        from owl2.serve.launch import serve_model
    except ModuleNotFoundError as error:
        raise _missing_extra(command, error.name) from error
    # Importing it takes seconds; the page imports it after the port is bound.
    if config.web and find_spec("gradio") is None:
        raise _missing_extra(command, "gradio")
    raise typer.Exit(serve_model(config))


def _missing_extra(command: str, package: str | None) -> InputError:
    return InputError(
        f"owl2 {command} needs the package {package}: pip install 'owl2-vlm[serve]'.",
        ErrorCode.MISSING_DEPENDENCY,
    )
