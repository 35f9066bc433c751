"""`owl2 init`: an untrained model from backbones."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    llm: Annotated[str, typer.Option(help="A LLaMA: directory, hub id, .gguf file, or 'fresh'.")],
    vision: Annotated[str, typer.Option(help="A CLIP tower: directory, hub id, or 'fresh'.")],
    output: Annotated[Path, typer.Option(help="Directory for the untrained model.")],
    sizes: Annotated[Path | None, typer.Option(help="YAML: sizes of what is fresh.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels an edge.")] = None,
    mam: Annotated[bool, typer.Option(help="Weights a modality; without: one set.")] = True,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja, for another format.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything fresh.")] = 0,
) -> None:
    """Put a LLaMA and a vision tower together: an untrained model for stage 1."""
    from owl2.train.init_model import init_checkpoint

    model = init_checkpoint(
        llm,
        vision,
        output,
        sizes=sizes,
        image_size=image_size,
        use_mam=mam,
        chat_template=chat_template,
        dtype=dtype,
        seed=seed,
    )
    print(f"{model.num_parameters():,} parameters, untrained; the model is in {output}")
