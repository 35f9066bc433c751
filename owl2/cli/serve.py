"""`owl2 serve` and `owl2 web`: an OpenAI-compatible server, and the same with the web page."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from owl2.errors import ErrorCode, InputError
from owl2.serve.config import ServerConfig, ServerLimits


def _server_command(name: str, description: str, **fixed: Any) -> Callable[..., None]:
    """A command with an option for each field of `ServerConfig` that is not in `fixed`."""

    def command(**options: Any) -> None:
        _start(name, ServerConfig(**options, **fixed))

    limits = {limit.name for limit in fields(ServerLimits)}
    parameters = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if setting.default is MISSING else setting.default,
            annotation=Annotated[
                setting.type,
                typer.Option(
                    f"--{setting.name.replace('_', '-')}",
                    help=setting.metadata["help"],
                    rich_help_panel="Limits (bytes, seconds)" if setting.name in limits else None,
                ),
            ],
        )
        for setting in sorted(fields(ServerConfig), key=lambda setting: setting.name in limits)
        if setting.name not in fixed
    ]
    command.__name__, command.__doc__ = name, description
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions accept it
    return command


def _start(command: str, config: ServerConfig) -> None:
    """Serve until a signal arrives, then exit with the server's exit code."""
    missing = None
    try:
        from owl2.serve.launch import serve_model
    except ModuleNotFoundError as error:
        missing = error.name
    # Importing gradio takes seconds; the page imports it after the port is bound.
    if missing is None and config.web and find_spec("gradio") is None:
        missing = "gradio"
    if missing is not None:
        raise InputError(
            f"owl2 {command} needs the package {missing}: pip install 'owl2-vlm[serve]'.",
            ErrorCode.MISSING_DEPENDENCY,
        )
    raise typer.Exit(serve_model(config))


serve = _server_command(
    "serve",
    """Serve a model with an OpenAI-compatible API.

    On SIGTERM or Ctrl-C the server finishes its requests and rejects new ones with status 503. The
    exit code is 0 if every request was finished, otherwise 1.
    """,
    examples=None,
)
web = _server_command(
    "web",
    """Serve a web page for questions about images, and the API.

    This is `owl2 serve --web` with the option --examples. The page is at /web, in English and
    Chinese, and works offline. If API keys are configured, visitors enter one of them as the
    password.
    """,
    web=True,
)
