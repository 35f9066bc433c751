"""The commands that put a model into people's hands: serve, web."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from owl2.errors import InputError

app = typer.Typer()

# What both commands take.
Model = Annotated[str, typer.Option(help="A checkpoint: directory or hub id.")]
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
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None, typer.Option(help="8bit or 4bit: the decoder in fewer bits, with bitsandbytes.")
]


@app.command("serve")
def serve_model(
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
    _start("serve", model, host=host, port=port, limits=limits or (), **options, **loading)


@app.command("web")
def open_page(
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
    _start("web", model, host=host, port=port, limits=limits or (), **options, **loading)


def _start(command: str, model: str, **options: Any) -> NoReturn:
    try:
        from owl2.serve.launch import Command, serve_model
    except ModuleNotFoundError as error:
        raise _needs_extra(command, error.name) from error
    # It takes seconds to be imported, and is so only when the page is made.
    if options["web"] and find_spec("gradio") is None:
        raise _needs_extra(command, "gradio")
    raise typer.Exit(serve_model(Command(model, **options)))


def _needs_extra(command: str, package: str | None) -> InputError:
    return InputError(f"owl2 {command} needs the package {package}: pip install 'owl2-vlm[serve]'.")
