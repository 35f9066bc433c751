"""`owl2 web`: the web page."""

from pathlib import Path
from typing import Annotated

import typer

from owl2.cli.options import Device, Dtype, Model, Quantize
from owl2.cli.server_options import Host, KeyFile, KeyVariable, LimitWords, Port, start_server


def web(
    model: Model,
    limits: LimitWords = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    examples: Annotated[
        Path | None,
        typer.Option(help='To begin with: JSON, [{"question": TEXT, "image": FILE}, ...].'),
    ] = None,
    api_key_env: KeyVariable = None,
    api_key_file: KeyFile = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What the page calls it; default: the directory's name.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Ask about images in a browser: `owl2 serve --web`, with examples of your own.

    The page is at /web, in English and Chinese, and needs no network. With API keys, a visitor
    gives one of them as the password.
    """
    options = {
        "name": served_model_name,
        "api_key_env": api_key_env,
        "api_key_file": api_key_file,
        "web": True,
        "examples": examples,
    }
    loading = {"device": device, "dtype": dtype, "quantize": quantize}
    start_server("web", model, host=host, port=port, limits=limits or (), **options, **loading)
