"""A recipe: everything a training run is told, as YAML; what is not written is the paper's.

    recipe.yaml ──► its `base` first, itself over it, `key=value` over both ──► Recipe

Two stages have two sets of defaults, those of the paper (SPEC §2), so a recipe holds only what
differs from it. This module knows what a recipe may say; `recipe_file` reads the files.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from owl2.runtime import has_bfloat16

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Checkpointing = bool | Literal["selective"]  # see owl2.train.parallelize

# What both stages share. `image_size: null` in a recipe means: as the checkpoint.
PAPER = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 1.0,
    "vision_layer_decay": 0.9,
    "gradient_checkpointing": True,
}
PAPER_STAGES: dict[int, dict[str, Any]] = {
    1: PAPER
    | {
        "image_size": 224,
        "augment": "crop_flip",
        "max_length": 256,
        "max_steps": 42_500,
        "batch_size": 8192,
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-6,
        "warmup_steps": 1000,
        "weight_decay": 0.05,
    },
    2: PAPER
    | {
        "image_size": 448,
        "augment": "none",
        "max_length": 2048,
        "max_steps": 4800,
        "batch_size": 256,
        "learning_rate": 2e-5,
        "min_learning_rate": 1e-7,
        "warmup_steps": 250,
        "weight_decay": 0.0,
    },
}


ORIGINS = ("dataset", "file", "shards", "table")
# Which settings go with which origin of samples.
SETTINGS_OF = {
    "images": ("file", "table"),
    "split": ("dataset", "table"),
    "style": ("dataset",),
    "options": ("dataset",),
}


class Part(BaseModel):
    """A part of a recipe: unknown keys and values of another type are refused, never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSource(Part):
    """Where samples come from, one of four: a `dataset` that owl2 knows by name, a `file` of
    samples, tar `shards` as WebDataset has them, or a `table` that `datasets` saved to disk."""

    name: str | None = Field(None, description="what the mixture calls it; default: where from")
    dataset: str | None = Field(None, description="a data set's name, e.g. easy_vqa")
    file: str | None = Field(None, description="LLaVA-style .json, or .jsonl of messages")
    shards: str | list[str] | None = Field(
        None, description="tar files: paths with * or {000..099}, http(s) or pipe: urls"
    )
    table: str | None = Field(None, description="directory that datasets' save_to_disk wrote")
    images: str | None = Field(
        None, description="folder that a file's or table's image paths start from"
    )
    split: str = Field("train", description="the split of a dataset or table")
    style: str | None = Field(None, description="how the data set becomes conversations")
    options: dict[str, Any] = Field({}, description="the data set's own other options")
    count: Positive | None = Field(None, description="samples an epoch; null = all of them once")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="share of the samples, relative to the other sources'; instead of count"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "DataSource":
        if len(self._origins()) != 1:
            raise ValueError("give one of `dataset`, `file`, `shards` and `table`")
        origin = self._origins()[0]
        for setting, owners in SETTINGS_OF.items():
            if setting in self.model_fields_set and origin not in owners:
                raise ValueError(f"`{setting}` belongs to a `{owners[0]}`, not to `{origin}`")
        if self.split.startswith("test"):
            raise ValueError("`split` is a test split, which is for evaluation only")
        if self.count is not None and self.weight is not None:
            raise ValueError("give either `count` or `weight`")
        return self

    def _origins(self) -> list[str]:
        return [name for name in ORIGINS if getattr(self, name) is not None]

    def origin(self) -> dict[str, Any]:
        """What `owl2.data.open_dataset.open_source` takes."""
        return self.model_dump(exclude={"name", "count", "weight"})

    @property
    def title(self) -> str:
        """What people know this source by: its name, else where it comes from."""
        origin = getattr(self, self._origins()[0])
        return self.name or (origin if isinstance(origin, str) else origin[0])


class Adapter(Part):
    """LoRA: small trained matrices beside frozen ones; what `trained` names is trained fully."""

    rank: Positive = 16
    alpha: Rate = Field(32.0, description="the update is scaled by alpha / rank")
    dropout: Share = 0.0
    parts: list[Literal["decoder", "abstractor", "vision"]] = Field(
        ["decoder"], min_length=1, description="parts whose Linears all get an adapter"
    )
    only: list[str] | None = Field(
        None, description="of those Linears the ones so named, e.g. [q_proj, v_proj]; null = all"
    )
    trained: list[Literal["abstractor", "vision"]] = Field(
        [], description="parts that are trained fully beside the adapters"
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Adapter":
        both = [part for part in self.trained if part in self.parts]
        if both:
            raise ValueError(
                f"{', '.join(both)} stands in `parts` and in `trained`: what is trained fully "
                "needs no LoRA"
            )
        return self


class Validation(Part):
    """What is watched on samples that are not trained on."""

    data: Annotated[list[DataSource], Field(min_length=1)] = Field(description="held-out samples")
    every: Positive = Field(500, description="steps between looks")
    samples: Positive | None = Field(1000, description="the first so many; null = all")
    answers: NotNegative = Field(3, description="questions whose generated answers are shown")

    @model_validator(mode="after")
    def _without_weights(self) -> "Validation":
        if any(source.weight is not None for source in self.data):
            raise ValueError("sources take turns here, so a `weight` has no meaning; give `count`")
        return self


class Recipe(Part):
    """All settings of a run. Paths are relative to the directory the command is given in.

    Fields without a value here have the paper's for their stage (`PAPER_STAGES`, SPEC §2).
    """

    model: str = Field(description="the checkpoint to start from: a directory or a hub id")
    output: str = Field(description="directory for the model, the report and the plots")
    overwrite: bool = Field(False, description="replace a finished model in `output`")
    stage: Literal[1, 2] = Field(description="1: vision, abstractor, visual weights of MAM; 2: all")
    data: Annotated[list[DataSource], Field(min_length=1)] = Field(description="where from")

    image_size: Positive | None = Field(description="pixels an edge; null = the checkpoint's")
    augment: Literal["none", "crop_flip", "flip", "dihedral"] = Field(
        description="what images undergo"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(description="tokens a sample, images' too")
    on_bad: Literal["stop", "skip"] = Field(
        "stop", description="a sample that cannot be used: stop, or leave it out and count it"
    )
    group_by_length: bool = Field(False, description="batches of samples about as long: less pad")
    packing: bool = Field(
        False, description="the samples of a batch in few long rows, kept apart: no padding"
    )
    shuffle_window: Positive = Field(
        1000, description="samples of shards that are held and shuffled at a time"
    )

    adapter: Adapter | None = Field(None, description="LoRA instead of full training")
    quantize: Literal["8bit", "4bit"] | None = Field(
        None, description="the frozen decoder in 8 or 4 bits; needs an adapter"
    )
    frozen: list[Literal["vision", "abstractor", "visual", "decoder"]] = Field(
        [], description="parts that stay as they are although the stage trains them"
    )

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="or max_steps")
    max_steps: Positive | None = Field(None, description="optimizer steps of the run; or epochs")
    batch_size: Positive = Field(description="samples an optimizer step, over all devices")
    gradient_accumulation: Positive = Field(1, description="pieces a device computes a step in")

    learning_rate: Rate = Field(description="the peak, reached after the warm-up")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(description="the cosine's end")
    warmup_steps: NotNegative = Field(description="steps of linear rise from 0 to the peak")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        description="AdamW's, on matrices only: not on norms, biases and embeddings"
    )
    adam_beta1: Share
    adam_beta2: Share
    adam_epsilon: Rate
    max_grad_norm: Rate = Field(description="gradients are clipped to this norm")
    vision_layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        description="rate of a ViT block, relative to the block above"
    )
    vision_learning_rate: Rate | None = Field(None, description="peak at the ViT's top, if other")
    abstractor_learning_rate: Rate | None = Field(None, description="the abstractor's, if other")

    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the arithmetic; null = bfloat16 where the hardware has it"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="how attention is computed; null = transformers' choice, sdpa"
    )
    gradient_checkpointing: Checkpointing = Field(
        description="true: least memory for a third more time; selective: half of both"
    )
    compile: bool = Field(
        False, description="torch compiles the repeated blocks, which takes minutes"
    )
    workers: NotNegative = Field(2, description="processes that prepare batches; 0 = none")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0  # NumPy takes no more
    log_every: Positive = Field(10, description="steps between lines of the log")
    save_every: Positive | None = Field(
        500, description="steps between saved states, which a killed run goes on from; null = none"
    )
    validation: Validation | None = Field(None, description="loss and answers on held-out samples")
    tensorboard: bool = Field(False, description="events for TensorBoard in OUTPUT/tensorboard")
    wandb: str | None = Field(None, description="the project in Weights & Biases")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_paper(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # With a stage that does not exist only that is to be reported, not what hangs on it.
        stage = given.get("stage")
        defaults = dict(PAPER_STAGES[2 if stage == 2 else 1])
        if given.get("epochs") is not None:
            del defaults["max_steps"]
        return defaults | given

    @field_validator("stage", mode="before")
    @classmethod
    def _a_number(cls, stage: Any) -> Any:
        if type(stage) is not int:  # True and 1.0 equal 1, so Literal would take them
            raise PydanticKnownError("literal_error", {"expected": "1 or 2"})
        return stage

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _one_of_three(cls, given: Any) -> Any:
        if given != "selective" and type(given) is not bool:
            raise PydanticKnownError("literal_error", {"expected": "true, false or 'selective'"})
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either `epochs` or `max_steps`")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"`batch_size` ({self.batch_size}) must be a multiple of "
                f"`gradient_accumulation` ({self.gradient_accumulation})"
            )
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            raise ValueError("`data`: give every source a `weight`, or none")
        if any(weighted) and self.epochs is not None:
            raise ValueError("`weight`s have no epochs: give `max_steps`")
        if self.adapter is not None and self.stage == 1:
            raise ValueError("`adapter` is for stage 2: stage 1 trains new weights, and fully")
        if self.adapter is not None and self.frozen:
            raise ValueError(
                "`frozen` is for full training: with an `adapter` all stays but what it trains"
            )
        if self.quantize is not None and self.adapter is None:
            raise ValueError("`quantize` needs an `adapter`: rounded weights cannot be trained")
        if self.packing and self.group_by_length:
            raise ValueError("`packing` leaves no padding, so `group_by_length` has no use")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"`min_learning_rate` ({self.min_learning_rate}) is above `learning_rate` "
                f"({self.learning_rate})"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            is_default = self.warmup_steps == PAPER_STAGES[self.stage]["warmup_steps"]
            default = f", the default of stage {self.stage}" if is_default else ""
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps}{default}) must be fewer than `max_steps` "
                f"({self.max_steps}), or the peak rate is never reached"
            )
        return self

    def precision_on(self, device_type: str) -> Literal["float32", "bfloat16"]:
        """The precision a run takes on "cuda", "cpu", …: the paper's bfloat16 where it is fast.

        "cpu" is this machine's.
        """
        if self.precision is not None:
            return self.precision
        fast = device_type == "cuda" or (device_type == "cpu" and has_bfloat16())
        return "bfloat16" if fast else "float32"
