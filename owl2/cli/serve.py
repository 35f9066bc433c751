"""`owl2 serve`: an OpenAI-compatible server."""

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
def serve(
    model: Model,
    limits: ServerLimits,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: ModelName = None,
    api_key_env: KeyVariable = None,
    api_key_file: KeyFile = None,
    web: Annotated[bool, typer.Option("--web", help="Also serve the web page, at /web.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    shutdown_timeout: ShutdownTimeout = 30.0,
) -> None:
    """Serve a model with an OpenAI-compatible API.

    On SIGTERM or Ctrl-C the server finishes its requests and rejects new ones with status 503. The
    exit code is 0 if every request was finished, otherwise 1.
    """
    start_server("serve", ServerConfig(**locals()))
