"""`owl2 init`: an untrained model from backbones."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    llm: Annotated[str, typer.Option(help="A LLaMA: directory, hub id, .gguf file, or 'fresh'.")],
    vision: Annotated[str, typer.Option(help="A CLIP tower: directory, hub id, or 'fresh'.")],
    output: Annotated[Path, typer.Option(help="Directory for the untrained model.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the sizes of fresh parts.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels per edge.")] = None,
    mam: Annotated[
        bool, typer.Option(help="Use the modality-adaptive module, or one set of weights.")
    ] = True,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file with another chat template.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Dtype of the weights: float32, bfloat16 ...; auto: that of the LLM."),
    ] = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the initialization.")
    ] = 0,
) -> None:
    """Combine a LLaMA and a vision tower to an untrained model for stage 1."""
    from owl2.train.init_model import init_checkpoint

    model = init_checkpoint(
        llm,
        vision,
        output,
        config=config,
        image_size=image_size,
        use_mam=mam,
        chat_template=chat_template,
        dtype=dtype,
        seed=seed,
    )
    print(f"{model.num_parameters():,} parameters, untrained; the model is in {output}")
