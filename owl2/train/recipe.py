"""The settings of a training run.

    recipe.yaml ──► its `base`, then the file itself, then `key=value` overrides ──► Recipe

The two training stages have different defaults, those of the paper (Specification §2), so a recipe
contains only what differs from them. Keys have the names of transformers' `TrainingArguments` and
peft's `LoraConfig` where these have the same setting. `recipe_file` reads the files.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from owl2.errors import ErrorCode, InputError
from owl2.registry import PositiveInteger, PositiveNumber
from owl2.runtime import cpu_supports_bf16

NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ is the home directory
Checkpointing = bool | Literal["selective"]  # see owl2.train.parallelize

# The defaults of stage 1 and stage 2.
PAPER_STAGES: dict[str, tuple[Any, Any]] = {
    "image_size": (224, 448),
    "augment": ("crop_flip", "none"),
    "max_length": (256, 2048),
    "max_steps": (42_500, 4800),
    "batch_size": (8192, 256),
    "learning_rate": (1e-4, 2e-5),
    "min_lr": (1e-6, 1e-7),
    "warmup_steps": (1000, 250),
    "weight_decay": (0.05, 0.0),
}
ORIGINS = ("dataset", "file", "shards", "hf_dataset")
# The origins that each of these settings applies to.
SETTINGS_OF = {
    "images": ("file", "hf_dataset"),
    "split": ("dataset", "hf_dataset"),
    "style": ("dataset",),
    "options": ("dataset",),
}


class Section(BaseModel):
    """A section of a recipe. Unknown keys and values of another type are refused, not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSource(Section):
    """One source of samples: a `dataset` known by name, a `file` of samples, WebDataset `shards`,
    or an `hf_dataset` that the library `datasets` saved to disk."""

    name: str | None = Field(None, description="name in the mixture; default: the origin")
    dataset: str | None = Field(None, description="name of a dataset, e.g. easy_vqa")
    file: LocalPath | None = Field(None, description="LLaVA-style .json, or .jsonl of messages")
    shards: LocalPath | list[LocalPath] | None = Field(
        None, description="tar files: paths with * or {000..099}, http(s) or pipe: URLs"
    )
    hf_dataset: LocalPath | None = Field(
        None, description="directory written by save_to_disk of the library datasets"
    )
    images: LocalPath | None = Field(
        None, description="root directory of the image paths in a file or hf_dataset"
    )
    split: str = Field("train", description="split of a dataset or hf_dataset")
    style: str | None = Field(None, description="how the dataset is converted to conversations")
    options: dict[str, Any] = Field({}, description="other options of the dataset")
    count: PositiveInteger | None = Field(
        None, description="samples per epoch; null: each sample once"
    )
    weight: PositiveNumber | None = Field(
        None, description="sampling weight relative to the other sources; excludes count"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "DataSource":
        origins = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(origins) != 1:
            raise ValueError("set exactly one of `dataset`, `file`, `shards` and `hf_dataset`")
        for setting, owners in SETTINGS_OF.items():
            if setting in self.model_fields_set and origins[0] not in owners:
                raise ValueError(f"`{setting}` applies to `{owners[0]}`, not to `{origins[0]}`")
        if self.split.startswith("test"):
            raise ValueError("`split` is a test split, which is reserved for evaluation")
        if self.count is not None and self.weight is not None:
            raise ValueError("give either `count` or `weight`")
        return self

    def origin(self) -> dict[str, Any]:
        """The arguments of `owl2.data.open_dataset.open_dataset`."""
        return self.model_dump(exclude={"name", "count", "weight"})

    @property
    def title(self) -> str:
        """The name for logs and messages: `name`, else the origin."""
        origin = self.dataset or self.file or self.shards or self.hf_dataset or ""
        return self.name or (origin if isinstance(origin, str) else origin[0])


class LoraSettings(Section):
    """Settings of LoRA, with the names of peft's `LoraConfig`."""

    r: PositiveInteger = 16
    lora_alpha: PositiveNumber = Field(32.0, description="the update is scaled by lora_alpha / r")
    lora_dropout: Share = 0.0
    parts: list[Literal["decoder", "abstractor", "vision"]] = Field(
        ["decoder"], min_length=1, description="parts of the model that get LoRA"
    )
    target_modules: list[str] | None = Field(
        None, description="names of the Linears in these parts, e.g. [q_proj, v_proj]; null: all"
    )
    modules_to_save: list[Literal["abstractor", "vision"]] = Field(
        [], description="parts that are trained fully and saved with the adapter"
    )

    @model_validator(mode="after")
    def _parts_are_disjoint(self) -> "LoraSettings":
        both = [part for part in self.modules_to_save if part in self.parts]
        if both:
            raise ValueError(
                f"{', '.join(both)} is in `parts` and in `modules_to_save`: a part that is trained "
                "fully needs no LoRA"
            )
        return self


class ValidationSettings(Section):
    """Settings of the validation on held-out samples during training."""

    data: Annotated[list[DataSource], Field(min_length=1)] = Field(description="held-out samples")
    eval_steps: PositiveInteger = Field(500, description="steps between validations")
    max_samples: PositiveInteger | None = Field(1000, description="number of samples; null: all")
    num_generations: NotNegative = Field(3, description="samples for which answers are generated")

    @model_validator(mode="after")
    def _no_weights(self) -> "ValidationSettings":
        if any(source.weight is not None for source in self.data):
            raise ValueError("validation takes sources in turn, so give `count`, not `weight`")
        return self


class Recipe(Section):
    """All settings of a run. Paths are relative to the working directory.

    The defaults are those of the paper; fields without one depend on the stage (`PAPER_STAGES`).
    """

    model: LocalPath = Field(description="checkpoint to start from: a directory or a hub id")
    output: LocalPath = Field(description="directory for the model, the logs and the plots")
    overwrite: bool = Field(False, description="replace a finished model in `output`")
    stage: Annotated[int, Field(ge=1, le=2)] = Field(
        description="1: vision, abstractor, visual weights of MAM; 2: all"
    )
    data: Annotated[list[DataSource], Field(min_length=1)] = Field(description="training samples")

    image_size: PositiveInteger | None = Field(
        description="pixels per edge; null: the checkpoint's"
    )
    augment: Literal["none", "crop_flip", "flip", "dihedral"] = Field(
        description="image augmentation"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        description="maximum tokens per sample, image tokens included"
    )
    on_invalid_sample: Literal["stop", "skip"] = Field(
        "stop", description="stop at a sample that cannot be used, or skip and count it"
    )
    chat_template: Literal["mplug_owl2", "v1"] | None = Field(
        None, description="conversation format; v1: with a system text; null: the checkpoint's"
    )
    group_by_length: bool = Field(False, description="batch samples of similar length")
    packing: bool = Field(
        False, description="pack the samples of a batch into few rows without padding"
    )
    shuffle_buffer: PositiveInteger = Field(
        1000, description="samples of shards shuffled at a time"
    )

    lora: LoraSettings | None = Field(None, description="LoRA instead of full training")
    quantize: Literal["8bit", "4bit"] | None = Field(
        None, description="quantize the frozen decoder to 8 or 4 bits; requires lora"
    )
    freeze: list[Literal["vision", "abstractor", "visual", "decoder"]] = Field(
        [], description="parts that stay frozen although the stage trains them"
    )

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="or max_steps")
    max_steps: PositiveInteger | None = Field(
        None, description="optimizer steps of the run; or epochs"
    )
    batch_size: PositiveInteger = Field(description="samples per optimizer step, over all devices")
    gradient_accumulation_steps: PositiveInteger = Field(
        1, description="micro-batches per optimizer step on each device"
    )

    learning_rate: PositiveNumber = Field(
        description="peak learning rate, reached after the warm-up"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(description="final value of the cosine decay")
    warmup_steps: NotNegative = Field(description="steps of linear warm-up from 0 to the peak")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        description="applies to matrices, not to norms, biases and embeddings"
    )
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.98
    adam_epsilon: PositiveNumber = 1e-6
    max_grad_norm: PositiveNumber = Field(1.0, description="gradients are clipped to this norm")
    vision_lr_layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="learning rate of a ViT block relative to the block above"
    )
    vision_learning_rate: PositiveNumber | None = Field(
        None, description="peak at the top of the ViT"
    )
    abstractor_learning_rate: PositiveNumber | None = Field(
        None, description="peak of the abstractor"
    )

    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the computation; null: bfloat16 where the hardware supports it"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = (
        Field(None, description="attention backend; null: sdpa, transformers' default")
    )
    gradient_checkpointing: Checkpointing = Field(
        True, description="true: least memory, a third more time; selective: about half of both"
    )
    compile: bool = Field(False, description="compile the repeated blocks with torch.compile")
    dataloader_num_workers: NotNegative = Field(2, description="processes that load the data")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0  # the range of NumPy's seeds
    logging_steps: PositiveInteger = Field(10, description="steps between lines of the log")
    save_steps: PositiveInteger | None = Field(
        500, description="steps between checkpoints for resuming; null: none"
    )
    validation: ValidationSettings | None = Field(None, description="validation during training")
    tensorboard: bool = Field(False, description="write TensorBoard events to OUTPUT/tensorboard")
    wandb_project: str | None = Field(None, description="project in Weights & Biases")

    @model_validator(mode="before")
    @classmethod
    def _add_stage_defaults(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        # For an invalid stage only the stage is reported, not the defaults that depend on it.
        index = 1 if settings.get("stage") == 2 else 0
        defaults = {name: values[index] for name, values in PAPER_STAGES.items()}
        if settings.get("epochs") is not None:
            del defaults["max_steps"]
        return defaults | settings

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _is_bool_or_selective(cls, value: Any) -> Any:
        if value != "selective" and type(value) is not bool:
            raise PydanticKnownError("literal_error", {"expected": "true, false or 'selective'"})
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either `epochs` or `max_steps`")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"`batch_size` ({self.batch_size}) must be a multiple of "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps})"
            )
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            raise ValueError("`data`: set a `weight` for every source, or for none")
        if any(weighted) and self.epochs is not None:
            raise ValueError("sources with a `weight` have no epochs: set `max_steps`")
        if self.lora is not None and self.stage == 1:
            raise ValueError("`lora` is for stage 2: stage 1 trains new weights fully")
        if self.lora is not None and self.freeze:
            raise ValueError("`freeze` is for full training: `lora` freezes all other weights")
        if self.quantize is not None and self.lora is None:
            raise ValueError("`quantize` requires `lora`: quantized weights cannot be trained")
        if self.packing and self.group_by_length:
            raise ValueError("`packing` leaves no padding, so `group_by_length` has no effect")
        if self.min_lr > self.learning_rate:
            raise ValueError(
                f"`min_lr` ({self.min_lr}) is above `learning_rate` ({self.learning_rate})"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            is_default = self.warmup_steps == PAPER_STAGES["warmup_steps"][self.stage - 1]
            default = f", the default of stage {self.stage}" if is_default else ""
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps}{default}) must be fewer than `max_steps` "
                f"({self.max_steps}), or the peak rate is never reached"
            )
        return self

    def micro_batch_size(self, devices: int) -> int:
        """Samples per micro-batch on each device.

        Raises:
            InputError: `batch_size` is not divisible.
        """
        micro_batches = devices * self.gradient_accumulation_steps
        if self.batch_size % micro_batches:
            raise InputError(
                f"batch_size ({self.batch_size}) must be a multiple of devices x "
                f"gradient_accumulation_steps ({devices} x {self.gradient_accumulation_steps})",
                ErrorCode.CONFLICT,
            )
        return self.batch_size // micro_batches

    def require_context(self, positions: int) -> None:
        """Raises an InputError if samples can have more tokens than the model has positions."""
        if self.max_length > positions:
            raise InputError(
                f"max_length ({self.max_length}) exceeds the {positions} positions of {self.model}",
                ErrorCode.TOO_LONG,
            )

    def resolve_dtype(self, device_type: str) -> Literal["float32", "bfloat16"]:
        """The dtype of the computation on "cuda", "cpu", ...: `dtype`, else bfloat16 where fast.

        "cpu" means the CPU of this machine.
        """
        if self.dtype is not None:
            return self.dtype
        fast = device_type == "cuda" or (device_type == "cpu" and cpu_supports_bf16())
        return "bfloat16" if fast else "float32"
