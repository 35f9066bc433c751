"""`owl2 serve`: an OpenAI-compatible server."""

from typing import Annotated

import typer

from owl2.cli.options import Device, Dtype, Model, Quantize
from owl2.cli.server_options import Host, KeyFile, KeyVariable, LimitWords, Port, start_server


def serve(
    model: Model,
    limits: LimitWords = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_env: KeyVariable = None,
    api_key_file: KeyFile = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call it; default: the directory's name.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="The web page too, at /web.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="To finish what runs, when it is to end.")
    ] = 30.0,
) -> None:
    """Serve a model behind OpenAI's chat API, until Ctrl-C or SIGTERM.

    Then it finishes what it has begun and refuses what is new (503). Exit code 0: all was finished;
    1: something was cut off.
    """
    options = {
        "name": served_model_name,
        "api_key_env": api_key_env,
        "api_key_file": api_key_file,
        "drain_seconds": drain_seconds,
        "web": web,
    }
    loading = {"device": device, "dtype": dtype, "quantize": quantize}
    start_server("serve", model, host=host, port=port, limits=limits or (), **options, **loading)
