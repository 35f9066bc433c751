"""transformers' Trainer with the optimizer, the schedule and the data loader of a recipe.

The differences from the Trainer are: parameter groups with their own learning rates, a data loader
with an exact position, InputErrors for losses, gradients and weights that are not finite, and
checkpoints that are complete or absent.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from owl2.checkpoints.adapters import has_adapter, load_adapter_weights
from owl2.data.collate import Batch
from owl2.data.dataloader import MixtureBatchSampler, MixtureDataLoader
from owl2.data.mixture import MixtureDataset
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2Model
from owl2.train.checkpointer import translate_disk_errors
from owl2.train.distributed import DistributedContext
from owl2.train.optimizer import make_adamw, recipe_groups
from owl2.train.parallelize import compile_blocks, enable_checkpointing
from owl2.train.recipe import Recipe
from owl2.train.score_loss import ScoreLoss
from owl2.train.train_dataloader import TrainDataLoader
from owl2.train.trainable import needs_images
from owl2.train.validation import Validator


class Owl2Trainer(Trainer):
    """Trains the trainable parameters of a model according to a recipe.

    Args:
        collate: Makes a `Batch` of the dataset's items.
        checkpoints: Directory for the checkpoints; its parent is the output directory.
        validator: Validates before the first step, every `eval_steps` and after the last step.

    Attributes:
        step_loss: Sum of the losses of the step's micro-batches in this process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        train_dataset: MixtureDataset,
        collate: Callable[[Sequence[Any]], Batch],
        checkpoints: Path,
        context: DistributedContext | None = None,
        validator: Validator | None = None,
    ) -> None:
        self.recipe = recipe
        self.context = context or DistributedContext()
        self.validator = validator
        self.step_loss: torch.Tensor | float = 0.0
        args = training_arguments(recipe, checkpoints, run_steps(recipe, train_dataset.epoch_size))
        held_out = None if validator is None else validator.dataset
        super().__init__(model=model, args=args, eval_dataset=held_out)
        self.remove_callback(PrinterCallback)  # `owl2.train.console` prints instead
        sampler = MixtureBatchSampler(
            train_dataset,
            args.per_device_train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            image_tokens=(
                train_dataset.processor.num_image_tokens if recipe.group_by_length else None
            ),
            pairs=recipe.has_pairs,
        )
        labels = train_dataset.score_labels
        self.score_loss = (
            ScoreLoss(recipe.loss, labels.level_ids) if recipe.loss and labels else None
        )
        loader = MixtureDataLoader(
            sampler,
            collate,
            num_workers=recipe.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        self.train_loader = TrainDataLoader(
            loader,
            self.accelerator,
            checkpoints.parent,
            recipe.on_invalid_sample,
            args.max_steps * recipe.batch_size,
            needs_images(model),
        )
        if recipe.gradient_checkpointing:
            enable_checkpointing(model, recipe.gradient_checkpointing == "selective")
        if recipe.compile:
            compile_blocks(model)
        if self.context.world_size > 1:
            # Each batch passes through every weight, because the other processes wait for it.
            for module in model.modules():
                if isinstance(module, Owl2Model):
                    module.run_all_branches = True

    def create_accelerator_and_postprocess(self) -> None:
        """Also shards by FSDP2 over CPUs, for which accelerate silently uses DDP."""
        super().create_accelerator_and_postprocess()
        if self.recipe.gradient_checkpointing:  # see `is_checkpointed`
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.context.sharding == "DeepSpeed" and not self.is_deepspeed_enabled:
            raise InputError(
                "DeepSpeed needs GPUs: use another file of recipes/accelerate",
                ErrorCode.UNSUPPORTED,
            )
        state = self.accelerator.state
        if self.context.sharding == "FSDP" and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if not self.is_fsdp_enabled:
            return
        # As DDP does, reduce gradients in float32. accelerate's policy also rounds the reduced
        # gradients and the loss to bfloat16.
        if self.args.bf16:
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        # Otherwise unsharded gradients are kept between micro-batches: 33 GB for 8 B parameters.
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def get_train_dataloader(self) -> Any:
        """The recipe's loader, which accelerate must not shard."""
        return self.train_loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of an optimizer step, and the number of their labels on all devices.

        With the loss of scoring models, the numbers of `ScoreLoss.count`.
        """
        with self.context.raise_on_all_ranks():
            batches = [next(epoch_iterator) for _ in range(num_batches)]
        if self.score_loss is None:
            labels = self._get_num_items_in_batch(batches, device)
        else:
            counts = sum(map(self.score_loss.count, batches), torch.zeros((), device=device))
            labels = self.accelerator.reduce(counts, "sum")
        self.train_loader.update_counts()
        return batches, labels

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate; the callbacks get the `ValidationResult`.

        The validation before the first step gives the starting point, and finds invalid held-out
        samples before any training.
        """
        assert self.validator is not None  # else the arguments have no `eval_strategy`
        model: Any = self.model
        result: Any = self.validator.evaluate(model, self.state.global_step)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return {"eval_loss": result.loss}

    # The Trainer saves the random state of each process with a checkpoint, and loads it before the
    # first batch. The position of the data is saved with it.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.train_loader.save(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.train_loader.load(Path(checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the recipe's parameter groups."""
        if self.optimizer is None:
            trained: Any = model or self.model
            groups = recipe_groups(trained, self.recipe)
            betas = (self.recipe.adam_beta1, self.recipe.adam_beta2)
            self.optimizer = make_adamw(groups, betas=betas, epsilon=self.recipe.adam_epsilon)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """The loss of the model or of the recipe."""
        # With logits the head is called once. The chunked loss calls it once per chunk of labels,
        # but sharded weights must be gathered equally often in all processes.
        if self.score_loss is None:
            inputs = {**inputs, "return_logits": self.context.sharding is not None}
            loss: Any = super().compute_loss(model, inputs, *args, **kw)
        else:
            loss = self.score_loss(model, inputs, kw["num_items_in_batch"])
            loss = loss * self.context.world_size  # gradients are averaged over the processes
        if not loss.requires_grad:
            # No images, and only the image path is trained: gradients of 0, as with several
            # processes (`run_all_branches`).
            trained = (p for p in model.parameters() if p.requires_grad)
            loss = loss + 0 * sum(parameter.sum() for parameter in trained)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch."""
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss
        return loss

    def check_finite(self) -> None:
        """Check the weights after an update; all processes must call it.

        Raises:
            InputError: Names the step and the first parameter that is not finite.
        """
        assert isinstance(self.model, nn.Module)
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        invalid = torch.stack([~local_shard(p).isfinite().all() for _, p in trained])
        counts = self.context.all_reduce_sum(*invalid.tolist())  # over the shards
        with self.context.raise_on_all_ranks():
            for (name, _), count in zip(trained, counts, strict=True):
                if count:
                    raise InputError(
                        f"step {self.state.global_step}: {name} is not finite after the update and "
                        "was not saved. Try a lower learning_rate or a longer warm-up",
                        ErrorCode.NON_FINITE,
                    )

    def full_state_dict(self) -> dict[str, Any] | None:
        """The unsharded weights, in the main process; None if weights are not sharded.

        All processes must call it.
        """
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            return None
        weights: dict[str, Any] = self.accelerator.get_state_dict(self.model_wrapped)
        return weights

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check_finite()
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with self.context.raise_on_all_ranks(), translate_disk_errors(directory):
                super()._save_checkpoint(*args, **kwargs)
        except InputError:
            shutil.rmtree(directory, ignore_errors=True)  # frees its space
            raise

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called once per step before the optimizer. One check here covers all micro-batches (on a
        # GPU each check waits for queued work), and the weights are still valid.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed has no norm for a skipped step. Otherwise the norm is equal in all processes.
        norm_value = 0.0 if norm is None else float(norm)
        loss = self.context.all_reduce_sum(float(self.step_loss))[0] / self.context.world_size
        self.step_loss = 0.0
        with self.context.raise_on_all_ranks():
            if not math.isfinite(loss + norm_value):
                raise InputError(
                    f"step {self.state.global_step + 1}: the loss is {loss} and the gradient norm "
                    f"{norm_value}; training stopped before the optimizer step, and nothing was "
                    "saved. Try a lower learning_rate, a longer warm-up, or dtype=float32",
                    ErrorCode.NON_FINITE,
                )
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The Trainer supports peft's model wrappers, not models that contain LoRA.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        assert isinstance(self.model, PreTrainedModel)
        if has_adapter(self.model) and not sharded:
            load_adapter_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer only warns of missing weights, also of tied ones, which are saved once.
        model = self.model
        assert isinstance(model, nn.Module)
        named = dict(model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
        lost = sorted(n for n in missing if n not in named or id(named[n]) not in loaded)
        if lost or load_result.unexpected_keys:
            raise InputError(
                f"{self.args.output_dir} contains the state of another model: missing {lost}, "
                f"unexpected {sorted(load_result.unexpected_keys)}; overwrite=true starts over",
                ErrorCode.RESUME_MISMATCH,
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the Trainer's estimate iterates over all parameters in each step, and omits the
        vision encoder."""
        return 0


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """The shard of this process under FSDP2 or ZeRO-3, else the parameter."""
    shard = getattr(parameter, "ds_tensor", parameter.detach())
    return shard.to_local() if isinstance(shard, DTensor) else shard


def run_steps(recipe: Recipe, epoch_size: int | None) -> int:
    """Optimizer steps of a run with `epoch_size` samples per epoch.

    The last batch of the last epoch is completed with samples of the next epoch.

    Raises:
        InputError: The warm-up takes all steps.
    """
    steps = recipe.max_steps
    if steps is None:
        assert recipe.epochs is not None and epoch_size is not None  # validated by the recipe
        # The margin is for 1.1 epochs of 10 samples, where 1.1 * 10 is slightly more than 11.
        steps = max(1, math.ceil(recipe.epochs * epoch_size / recipe.batch_size - 1e-6))
    if recipe.warmup_steps >= steps:
        raise InputError(
            f"warmup_steps ({recipe.warmup_steps:g}) must be fewer than the run's steps ({steps}), "
            "or the peak rate is never reached",
            ErrorCode.CONFLICT,
        )
    return steps


def training_arguments(recipe: Recipe, checkpoints: Path, max_steps: int) -> TrainingArguments:
    """The Trainer's arguments for a recipe with `max_steps` optimizer steps.

    Raises:
        InputError: The batch size is not divisible, or the device does not support the dtype.
    """
    has_cuda = torch.cuda.is_available()
    dtype = recipe.resolve_dtype("cuda" if has_cuda else "cpu")
    if dtype == "bfloat16" and has_cuda and not torch.cuda.is_bf16_supported():
        raise InputError(
            "dtype: this GPU does not support bfloat16; set dtype=float32", ErrorCode.UNSUPPORTED
        )
    args = TrainingArguments(
        output_dir=str(checkpoints),
        use_cpu=not has_cuda and not torch.backends.mps.is_available(),
        bf16=dtype == "bfloat16",
        max_steps=max_steps,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",  # after a linear warm-up
        # A ratio, because the parameter groups have different peaks.
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_lr / recipe.learning_rate},
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        ignore_data_skip=True,  # the loader resumes by itself
        dataloader_pin_memory=has_cuda,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # with several processes every weight is used
        ddp_broadcast_buffers=False,  # they are constant, and contain the quantized weights
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide them; see `_get_grad_norm`
        eval_strategy="steps" if recipe.validation else "no",
        eval_steps=recipe.validation.eval_steps if recipe.validation else None,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        report_to="none",
        disable_tqdm=True,
    )
    args.per_device_train_batch_size = recipe.micro_batch_size(args.world_size)
    # Without a launcher the Trainer would use several GPUs by DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args
