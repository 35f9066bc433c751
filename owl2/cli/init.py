"""`owl2 init`: an untrained model from backbones."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    llm: Annotated[
        str, typer.Option(help="LLaMA: a directory, a hub id, a .gguf file, or 'fresh'.")
    ],
    vision: Annotated[
        str, typer.Option(help="CLIP vision encoder: a directory, a hub id, or 'fresh'.")
    ],
    output: Annotated[Path, typer.Option(help="Directory for the untrained model.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the sizes of fresh parts.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Image size in pixels; default: that of CLIP.")
    ] = None,
    mam: Annotated[
        bool, typer.Option(help="Separate weights per modality (MAM), or one set of weights.")
    ] = True,
    mam_modules: Annotated[
        list[str] | None,
        typer.Option(help="Module with separate weights, e.g. k_proj; repeatable. Default: all."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file with the chat template.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Dtype of the weights: float32, bfloat16 ...; auto: that of the LLM."),
    ] = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the initialization.")
    ] = 0,
) -> None:
    """Create an untrained model for stage 1 from a LLaMA and a CLIP vision encoder."""
    from owl2.train.init_model import init_checkpoint

    model = init_checkpoint(
        llm,
        vision,
        output,
        config=config,
        image_size=image_size,
        use_mam=mam,
        mam_modules=mam_modules,
        chat_template=chat_template,
        dtype=dtype,
        seed=seed,
    )
    print(f"{model.num_parameters():,} parameters, untrained; the model is in {output}")
