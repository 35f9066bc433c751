"""Models to choose from: what `owl2 chat` prints without `--model`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SMALL_MODEL = "runs/small-model/model"  # recipes/small/
DOCUMENTATION = "docs/models.md"


@dataclass(frozen=True)
class ModelChoice:
    """A model for `owl2 chat`.

    Attributes:
        model: The value of `--model`.
        registry_key: Its entry in `owl2.model.registry.MODEL_TYPES`, whose default configuration is
            that of the released model; None: the model is local.
        purpose: What it answers questions about.
        settings: Where the released model has others than the default configuration.
    """

    model: str
    registry_key: str | None
    purpose: str
    settings: Mapping[str, Any] = field(default_factory=dict)


CHOICES = (
    ModelChoice(SMALL_MODEL, None, "drawings, icons and shapes"),
    ModelChoice("MAGAer13/mplug-owl2-llama2-7b", "mplug_owl2", "images"),
    ModelChoice("Mizukiluke/mplug_owl_2_1", "mplug_owl2_1", "images, in English and Chinese"),
    ModelChoice("mPLUG/DocOwl1.5-Omni", "mplug_docowl", "pages, tables and charts"),
    ModelChoice(
        "mPLUG/DocOwl2",
        "mplug_docowl2",
        "several pages",
        {"visual_config": {"visual_model": {"image_size": 504}, "visual_hrcompressor": {}}},
    ),
)


def choices_table() -> "Table":
    """The models with the memory that `owl2 chat` needs on this machine's CPU.

    A local model that does not exist yet has the command that creates it.
    """
    from rich.table import Table

    from owl2.checkpoints.config_file import read_config
    from owl2.cli.info import memory_of_commands
    from owl2.memory import available_memory, format_size
    from owl2.model.registry import get_model_type

    table = Table(title="Models", title_justify="left")
    table.add_column("--model", no_wrap=True)  # to be copied
    table.add_column("answers questions about")
    for column in ("16 bits", "8bit", "4bit"):
        table.add_column(column, justify="right", no_wrap=True)
    for choice in CHOICES:
        if choice.registry_key is not None:
            config = get_model_type(choice.registry_key).load("config")(**choice.settings)
        elif Path(choice.model).is_dir():
            config = read_config(choice.model)
        else:
            table.add_row(choice.model, f"{choice.purpose}, after `make small-model`")
            continue
        needed = memory_of_commands(config)
        sizes = [format_size(size) for name, size in needed.items() if name.startswith("chat")]
        table.add_row(choice.model, choice.purpose, *sizes)
    table.caption = (
        "The sizes are the memory needed, without and with --quantize 8bit or 4bit; "
        f"{format_size(available_memory())} can be used here. Models without a local directory are "
        f"downloaded from the hub, 16 to 23 GB each; {DOCUMENTATION} has more models and licenses."
    )
    return table
