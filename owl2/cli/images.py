"""The commands that look inside or go over many images: attend, caption."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()

Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Quantize = Annotated[str | None, typer.Option(help="8bit or 4bit: the decoder in fewer bits.")]


@app.command("attend")
def draw_attention(
    model: Annotated[str, typer.Option(help="A checkpoint: directory or hub id.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    output: Annotated[Path, typer.Option(help="Folder for the figures and attention.npz.")],
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image: file or URL. Goes before the question, or to its <|image|>."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Such as 0,15,-1,mean. Default: first, middle, last and the mean."),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(help="Of the answer, to be painted over the image. Default: each."),
    ] = None,
    without_mam: Annotated[
        bool, typer.Option("--without-mam", help="Beside it the same without MAM.")
    ] = False,
    answer: Annotated[
        str | None, typer.Option(help="Look at this one instead of the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the answer at most.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Draw where the model looks while it answers: at which words, and where in the image."""
    from owl2.attention.command import Settings, attend
    from owl2.engine.load_model import ModelArgs

    settings = Settings(
        ModelArgs(model, device, dtype, quantize=quantize),
        question,
        image or [],
        output,
        layers,
        word or [],
        without_mam,
        answer,
        max_new_tokens,
    )
    attend(settings, Console(soft_wrap=True))


@app.command("caption")
def caption_images(
    folder: Annotated[Path, typer.Argument(help="With the images.")],
    model: Annotated[str, typer.Option(help="A checkpoint: directory or hub id.")],
    output: Annotated[Path, typer.Option(help="A .jsonl file: a line an image.")],
    prompt: Annotated[
        str, typer.Option(help="What is asked about each image.")
    ] = "Provide a one-sentence caption for the provided image.",
    recursive: Annotated[bool, typer.Option("--recursive", help="Folders in it, too.")] = False,
    engine: Annotated[str, typer.Option(help="owl2 or vllm.")] = "owl2",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Caption all images of a folder, or ask the same about each.

    Started again after it was stopped, it goes on where it was. Several processes share the work,
    as torchrun or srun start them (RANK, WORLD_SIZE).
    """
    from owl2.caption.command import Settings, caption

    settings = Settings(
        folder,
        model,
        output,
        prompt,
        recursive,
        engine,
        max_new_tokens,
        batch_size,
        device,
        dtype,
        quantize,
    )
    caption(settings, Console(soft_wrap=True))
