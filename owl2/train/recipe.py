"""The settings of a training run.

    recipe.yaml ──► its `base`, then the file itself, then `key=value` overrides ──► Recipe

The two training stages have different defaults, those of the paper (Specification §2), so a recipe
contains only what differs from them. Keys have the names of transformers' `TrainingArguments` and
peft's `LoraConfig` where these have the same setting. `recipe_file` reads the files.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from owl2.errors import ErrorCode, InputError
from owl2.registry import PositiveInteger, PositiveNumber
from owl2.runtime import cpu_supports_bf16
from owl2.train.recipe_sections import (
    Checkpointing,
    DataSource,
    LocalPath,
    LoraSettings,
    LossSettings,
    NotNegative,
    Section,
    Share,
    ValidationSettings,
)

if TYPE_CHECKING:
    from owl2.data.score_labels import ScoreLabels
    from owl2.processing.processor import Owl2Processor

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
    image_policy: Literal["resize", "pad", "crop"] | None = Field(
        None, description="how images become squares, as of --image-policy; null: the checkpoint's"
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

    loss: LossSettings | None = Field(
        None, description="loss of scoring models; null: the cross-entropy of the answers"
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
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        description="steps of linear warm-up from 0 to the peak; below 1: a share of all steps"
    )
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
        if self.packing and self.loss is not None:
            raise ValueError("`packing` is for the loss of answers, not for `loss`")
        if self.packing and self.group_by_length:
            raise ValueError("`packing` leaves no padding, so `group_by_length` has no effect")
        if self.min_lr > self.learning_rate:
            raise ValueError(
                f"`min_lr` ({self.min_lr}) is above `learning_rate` ({self.learning_rate})"
            )
        if self.warmup_steps > 1 and not self.warmup_steps.is_integer():
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps:g}) must be an integer, or below 1"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            is_default = self.warmup_steps == PAPER_STAGES["warmup_steps"][self.stage - 1]
            default = f", the default of stage {self.stage}" if is_default else ""
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps:g}{default}) must be fewer than `max_steps` "
                f"({self.max_steps}), or the peak rate is never reached"
            )
        return self

    @property
    def has_pairs(self) -> bool:
        """Whether each sample of a batch has a partner."""
        return self.loss is not None and self.loss.dataset_type == "pair"

    def processor_options(self) -> dict[str, Any]:
        """The arguments of `Owl2Processor.from_pretrained` for training."""
        settings = {"chat_template": self.chat_template, "image_policy": self.image_policy}
        return {"image_newline": True} | {k: v for k, v in settings.items() if v is not None}

    def score_labels(self, processor: "Owl2Processor") -> "ScoreLabels | None":
        """The labels that `loss` needs; None without `loss`."""
        from owl2.data.score_labels import ScoreLabels

        if self.loss is None:
            return None
        return ScoreLabels.from_processor(processor, self.loss.level_prefix)

    def model_settings(self, labels: "ScoreLabels | None") -> dict[str, Any]:
        """What ``config.json`` of the trained model contains of the recipe, as the authors' do."""
        settings: dict[str, Any] = {}
        if self.image_policy is not None:
            settings["image_aspect_ratio"] = "pad" if self.image_policy == "pad" else None
        if self.loss is not None and labels is not None:
            settings |= self.loss.model_dump(exclude={"dataset_type", "level_prefix"})
            settings["level_prefix"] = list(labels.prefix_ids)
            settings["level_ids"] = list(labels.level_ids)
        return settings

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
