"""Options that several commands share, and paths with ``~``."""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.json_records import json_object

Model = Annotated[str, typer.Option(help="Checkpoint: a directory or a hub id.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        help="Image file or URL; repeatable. Replaces the <|image|> placeholders of the question "
        "in order, or precedes the question."
    ),
]
Videos = Annotated[
    list[str] | None,
    typer.Option(
        help="Video file, folder of frames, or URL; repeatable. Replaces the <|video|> "
        "placeholders of the question in order, or follows the images before the question."
    ),
]
NumFrames = Annotated[
    int | None,
    typer.Option(
        min=1, help="Evenly spaced frames of each video; default: that of the checkpoint, 8."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Base model of an adapter; default: the one that the adapter names."),
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the first available.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: the best for the device.")
]
Quantize = Annotated[
    str | None, typer.Option(help="8bit or 4bit: quantize the weights of the decoder.")
]
ActivationBits = Annotated[
    int,
    typer.Option(
        help="16 or 8: bits of the inputs of quantized layers on a CPU; 8 is faster and less "
        "precise."
    ),
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
JsonSchema = Annotated[
    Path | None, typer.Option(help="File with a JSON schema; answers are JSON that follows it.")
]
Choice = Annotated[
    list[str] | None,
    typer.Option(
        help="A possible answer; repeatable. Answers are one of them.", show_default=False
    ),
]
# A command with one of these parameters loads a model.
MODEL_PARAMETERS = {"model", "recipe", "llm", "adapter"}
# Parameters of type `str` that can be paths; the others are hub ids, URLs or names.
TEXT_PATHS = {
    *("model", "base", "llm", "vision", "adapter", "config_from"),
    *("source", "image", "video", "api_key_file", "examples"),
}


def structured_outputs(json_schema: Path | None, choice: list[str] | None) -> dict[str, Any] | None:
    """The constraint on the answers, as `Engine.chat` takes it.

    Raises:
        InputError: Both options are given, or the file is not a JSON schema; as
            `StructuredOutputsParams` and `llguidance_grammar`.
    """
    if json_schema is None and not choice:
        return None
    if json_schema is not None and choice:
        raise InputError("--json-schema and --choice exclude each other.", ErrorCode.CONFLICT)
    from owl2.engine.sampling_params import StructuredOutputsParams
    from owl2.engine.structured_output import llguidance_grammar

    value = {"choice": choice} if json_schema is None else {"json": json_object(json_schema).value}
    # This finds errors before the model is loaded.
    llguidance_grammar(StructuredOutputsParams.from_value(value))
    return value


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
        function(**{name: _expand(name, value) for name, value in options.items()})

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # functions accept it
    return run


def _expand(name: str, value: Any) -> Any:
    """The value of a parameter, with ``~`` expanded if it is a path or a list of paths."""
    if isinstance(value, Path):
        return expand_user(value)
    if name in TEXT_PATHS and isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, list):
        return [_expand(name, path) for path in value]
    return value
