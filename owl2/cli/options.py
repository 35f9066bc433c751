"""Options that several commands share, and paths with ``~``."""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from owl2.files import expand_user

Model = Annotated[str, typer.Option(help="Checkpoint: a directory or a hub id.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        help="Image file or URL; repeatable. Replaces the <|image|> placeholders of the question "
        "in order, or precedes the question."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Base model of an adapter; default: the one that the adapter names."),
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None, typer.Option(help="8bit or 4bit: quantize the weights of the decoder.")
]
Recipe = Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Override keys of the recipe, e.g. learning_rate=1e-4 or data.0.count=100.",
        show_default=False,
    ),
]
Hub = Annotated[
    Literal["huggingface", "modelscope"] | None,
    typer.Option(
        help="Hub of model ids; default: huggingface, or modelscope with the environment variable "
        "OWL2_USE_MODELSCOPE=1.",
        show_default=False,
    ),
]
# A command with one of these parameters loads a model.
MODEL_PARAMETERS = {"model", "recipe", "llm", "adapter"}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command that expands ``~`` in its paths and, if it loads a model, has the option --hub."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if MODEL_PARAMETERS & signature.parameters.keys():
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("hub", keyword, default=None, annotation=Hub))

    @functools.wraps(function)
    def run(*, hub: str | None = None, **options: Any) -> None:
        if hub is not None:  # a variable, so that all processes of the command use the same hub
            os.environ["OWL2_USE_MODELSCOPE"] = str(int(hub == "modelscope"))
        for name, value in options.items():
            options[name] = expand_user(value) if isinstance(value, Path) else value
        function(**options)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # functions accept it
    return run
