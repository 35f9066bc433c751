"""`owl2 web`: the web page."""

from pathlib import Path
from typing import Annotated

import typer

from owl2.cli.options import Device, Dtype, Model, Quantize
from owl2.cli.server_options import (
    Host,
    KeyFile,
    KeyVariable,
    ModelName,
    Port,
    ShutdownTimeout,
    limit_options,
    start_server,
)
from owl2.serve.config import ServerConfig, ServerLimits


@limit_options
def web(
    model: Model,
    limits: ServerLimits,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    examples: Annotated[
        Path | None,
        typer.Option(help='Example questions: JSON, [{"question": TEXT, "image": FILE}, ...].'),
    ] = None,
    served_model_name: ModelName = None,
    api_key_env: KeyVariable = None,
    api_key_file: KeyFile = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    shutdown_timeout: ShutdownTimeout = 30.0,
) -> None:
    """Ask about images in a browser: `owl2 serve --web` with your own examples.

    The page is at /web, in English and Chinese, and works offline. If API keys are configured,
    visitors enter one of them as the password.
    """
    start_server("web", ServerConfig(**locals(), web=True))
