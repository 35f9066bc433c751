"""The sections of a recipe: sources of samples, LoRA, the loss of scoring models, validation."""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from owl2.registry import PositiveInteger, PositiveNumber

NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]  # of a part of a loss
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ is the home directory
Checkpointing = bool | Literal["selective"]  # see owl2.train.parallelize

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


class LossSettings(Section):
    """The loss of scoring models (Model family §3.3), with the names of DeQA-Score.

    All but the first two settings are written to ``config.json`` of the trained model.
    """

    dataset_type: Literal["single", "pair"] = Field(
        "pair", description="pair: also the order of two images of a source"
    )
    level_prefix: Annotated[str, Field(min_length=1)] = Field(
        "The quality of the image is", description="the answers before the level word"
    )
    softkl_loss: bool = Field(
        True, description="train the probabilities of the levels, not one level word"
    )
    continuous_rating_loss: bool = Field(
        True, description="compare the probabilities of an order, not the order"
    )
    binary_rating_loss: Literal["fidelity", "bce"] = Field(
        "fidelity", description="loss of an order, without continuous_rating_loss"
    )
    closeset_rating_loss: bool = Field(
        True, description="scores by the softmax over the levels, not over the vocabulary"
    )
    use_fix_std: bool = Field(True, description="predicted scores have standard deviation 1")
    detach_pred_std: bool = Field(
        True, description="no gradients through predicted standard deviations"
    )
    weight_rank: Weight = Field(1.0, description="weight of the order of pairs")
    weight_next_token: Weight = Field(0.05, description="weight of the answers, with their levels")
    weight_softkl: Weight = Field(1.0, description="weight of the levels within the answers")
    weight_in_level: Weight | None = Field(
        None, description="weight of the probability of words that are no level"
    )
    weight_desp: Weight = Field(1.0, description='weight of rows with task_type "description"')


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
