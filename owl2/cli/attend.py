"""`owl2 attend`: attention maps of an answer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from owl2.cli.options import Base, Device, Dtype, Images, Model, Quantize


def attend(
    model: Model,
    question: Annotated[str, typer.Argument(help="The question to ask.")],
    output: Annotated[Path, typer.Option(help="Directory for the figures and attention.npz.")],
    image: Images = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to draw, such as 0,15,-1,mean. Default: first, middle, last and mean."
        ),
    ] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(
            help="Word of the answer to draw a heatmap for; repeatable. Default: up to 7."
        ),
    ] = None,
    compare_no_mam: Annotated[
        bool, typer.Option("--compare-no-mam", help="Add the same figures without MAM.")
    ] = False,
    answer: Annotated[
        str | None, typer.Option(help="Analyze this answer instead of generating one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens to generate.")] = 64,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Answer a question and draw the attention of the decoder over the tokens and the image."""
    from owl2.attention.command import attend as run_attend
    from owl2.engine.load_model import ModelArgs

    run_attend(
        ModelArgs(model, device, dtype, quantize=quantize, base=base),
        question,
        output,
        Console(soft_wrap=True),
        images=image or [],
        layers=layers,
        words=token or [],
        compare_no_mam=compare_no_mam,
        answer=answer,
        max_new_tokens=max_new_tokens,
    )
