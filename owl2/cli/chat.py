"""The command that asks a model: chat."""

from typing import Annotated

import typer

app = typer.Typer()


@app.command("chat")
def chat_with_model(
    model: Annotated[str, typer.Option(help="A checkpoint: directory or hub id.")],
    question: Annotated[
        str | None, typer.Argument(help="Ask this and end; without it: a conversation.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image: file or URL. Goes before the question, or to its <|image|>."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample; 0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="The same seed, the same answer.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    image_policy: Annotated[
        str | None, typer.Option(help="resize or pad: how an image becomes a square.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="The largest image accepted.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="8bit or 4bit: the decoder in fewer bits, with bitsandbytes.")
    ] = None,
) -> None:
    """Ask about images: one question, or a conversation on the terminal."""
    from owl2.engine.chat_session import ask, converse
    from owl2.engine.load_model import ModelArgs

    settings = ModelArgs(model, device, dtype, image_policy, max_pixels, quantize)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    if question is None:
        converse(settings, image or [], options)
    else:
        ask(settings, question, image or [], options)
