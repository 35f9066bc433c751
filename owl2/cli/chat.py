"""`owl2 chat`: one question, or a conversation on the terminal."""

import sys
from typing import Annotated, Any

import typer

from owl2.cli.options import (
    ActivationBits,
    Base,
    Choice,
    Device,
    Dtype,
    Images,
    JsonSchema,
    NumFrames,
    Quantize,
    Videos,
    structured_outputs,
)
from owl2.errors import ErrorCode, InputError


def chat(
    question: Annotated[
        str | None,
        typer.Argument(help="Ask one question and exit; omit it for an interactive chat."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: a directory or a hub id. Without this option, models are listed.",
            show_default=False,
        ),
    ] = None,
    image: Images = None,
    video: Videos = None,
    num_frames: NumFrames = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Maximum tokens to generate.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Random seed for sampling.")
    ] = None,
    json_schema: JsonSchema = None,
    choice: Choice = None,
    truncate_history: Annotated[
        bool,
        typer.Option(
            "--truncate-history",
            help="Interactive chat: drop the oldest turns when the conversation exceeds the "
            "context.",
        ),
    ] = False,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    image_policy: Annotated[
        str | None, typer.Option(help="resize, pad or crop: how an image becomes square.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Largest image accepted, in pixels.")
    ] = None,
    quantize: Quantize = None,
    activation_bits: ActivationBits = 16,
) -> None:
    """Ask about images and videos: one question, or an interactive chat."""
    if model is None:
        from rich.console import Console

        from owl2.cli.model_choices import choices_table

        Console(stderr=True).print(choices_table())
        raise InputError("Choose a model with --model.", ErrorCode.MISSING_VALUE)
    from owl2.checkpoints.read_ahead import read_ahead

    read_ahead(model)  # while the following modules are imported
    from owl2.cli.repl import Repl, load_frames, placeholder_note
    from owl2.engine.engine import Engine
    from owl2.engine.load_model import ModelArgs
    from owl2.processing.image_io import load_image
    from owl2.processing.messages import user_message
    from owl2.scoring.methods import check_answers

    check_answers(model)
    model_args = ModelArgs(
        model,
        device,
        dtype,
        image_policy,
        max_pixels,
        quantize,
        base,
        activation_bits=activation_bits,
    )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "structured_outputs": structured_outputs(json_schema, choice),
    }
    processor = model_args.load_processor()
    # The input may be invalid: it is read before the model is loaded, which takes a while.
    if question is None:
        max_pixels = processor.image_processor.max_pixels
        images = [load_image(one, max_pixels) for one in image or []]
        processor.num_frames = num_frames or processor.num_frames
        videos = [load_frames(one, processor) for one in video or []]
    else:
        message = user_message(question, image or [], video or [], num_frames)
        prompt = processor.encode([message], model_args.context_length())
        print(placeholder_note(question), end="", file=sys.stderr)
    engine = Engine(model_args.load_model(), processor, enable_prefix_caching=True)
    if question is None:
        print(f"{model} on {engine.model.device}. Type /help for help.")
        repl = Repl(engine, options, images, truncate_history=truncate_history, videos=videos)
        repl.run()
        return
    for text in engine.stream(prompt, **options):
        print(text, end="", flush=True)
    print(flush=True)
