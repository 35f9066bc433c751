"""transformers' Trainer with a recipe's optimizer and schedule, and a check of every loss.

What is different from the Trainer, and all that is: groups of parameters with rates of their own,
losses and gradients that must be finite, a step without needless work, and its own progress.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from owl2.checkpoints.adapters import has_adapter, load_adapter_weights
from owl2.data.collate import Batch
from owl2.data.dataloader import MixtureDataLoader
from owl2.data.mixture import MixtureDataset
from owl2.errors import InputError
from owl2.model.modeling import Owl2Model
from owl2.train.disk_errors import writing
from owl2.train.distributed import Team
from owl2.train.optimizer import make_adamw, recipe_groups
from owl2.train.parallelize import compile_blocks, enable_checkpointing
from owl2.train.recipe import Recipe
from owl2.train.train_dataloader import Feed, Seen, TellEpochs, run_steps


class Owl2Trainer(Trainer):
    """A Trainer for the model's trainable parameters, as a recipe says."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        train_dataset: MixtureDataset,
        collate: Callable[[Sequence[Any]], Batch],
        checkpoints: Path,
        team: Team | None = None,
    ) -> None:
        """`collate` makes a batch for the model of the data set's items."""
        self.recipe = recipe
        self.team = team or Team()
        self._step_loss: torch.Tensor | float = 0.0
        # Whether this process has met a label, on any device; a tensor, as looking would wait.
        self._labelled: torch.Tensor = torch.tensor(False)
        epoch_size = train_dataset.epoch_size
        epochs = TellEpochs(epoch_size, recipe.batch_size)
        super().__init__(
            model=model,
            args=training_arguments(recipe, checkpoints, run_steps(recipe, epoch_size)),
            callbacks=[epochs],
        )
        epochs.handler = self.callback_handler
        self.feed = self._make_feed(train_dataset, collate, checkpoints.parent)
        self.remove_callback(PrinterCallback)  # would print dicts between our lines
        if recipe.gradient_checkpointing:
            enable_checkpointing(model, recipe.gradient_checkpointing == "selective")
        if recipe.compile:
            compile_blocks(model)
        if self.team.size > 1:
            share_every_weight(model)

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's; shards by FSDP2 between CPUs, too, where accelerate would not say a word
        and train with whole copies."""
        super().create_accelerator_and_postprocess()
        if self.recipe.gradient_checkpointing:  # see `is_checkpointed`
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.team.sharing == "DeepSpeed" and not self.is_deepspeed_enabled:
            raise InputError("DeepSpeed is for GPUs: use another of recipes/accelerate here")
        state = self.accelerator.state
        if self.team.sharing == "FSDP" and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            share_out_precisely(self.accelerator, half=self.args.bf16)

    def _make_feed(
        self, dataset: MixtureDataset, collate: Callable[[Sequence[Any]], Batch], output: Path
    ) -> Feed:
        recipe, args = self.recipe, self.args
        loader = MixtureDataLoader(
            dataset,
            collate,
            args.per_device_train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            image_tokens=dataset.processor.num_image_tokens if recipe.group_by_length else None,
            num_workers=recipe.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        return Feed(loader, self.accelerator, output, recipe.on_invalid_sample)

    @property
    def seen(self) -> Seen:
        """What all processes together have been trained on since this one began."""
        return self.feed.seen

    @property
    def waited(self) -> float:
        """Seconds that this process has waited for batches since it began."""
        return self.feed.loader.wait_seconds

    def get_train_dataloader(self) -> Any:
        """Ours: it knows its share, and accelerate is to leave it as it is."""
        return self.feed

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one optimizer step, and how many labels they have on all devices."""
        with self.team.together():
            batches = [next(epoch_iterator) for _ in range(num_batches)]
        labels = self._get_num_items_in_batch(batches, device)
        self.feed.share_counts()
        return batches, labels

    # The Trainer keeps the state of chance for each process: when it saves, and when it goes on,
    # before the first batch. What comes next of the data belongs to it.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.feed.save(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.feed.load(Path(checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the recipe's groups of parameters."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None  # a Trainer without a model is refused by its __init__
            groups = recipe_groups(trained, self.recipe)
            betas = (self.recipe.adam_beta1, self.recipe.adam_beta2)
            self.optimizer = make_adamw(groups, betas=betas, epsilon=self.recipe.adam_epsilon)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up, then a cosine from each group's peak to its minimum."""
        if self.recipe.warmup_steps >= num_training_steps:
            raise InputError(
                f"warmup_steps ({self.recipe.warmup_steps}) must be fewer than the run's steps "
                f"({num_training_steps}), or the peak rate is never reached"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """The model's loss; refuses a batch from which this stage can learn nothing."""
        # Where processes share out the weights, all of them must ask for the head's as often, and
        # chunks ask as often as there are labels.
        inputs = {**inputs, "return_logits": self.team.sharing != "each whole"}
        result = super().compute_loss(model, inputs, *args, **kw)
        loss = result[0] if isinstance(result, tuple) else result
        if not loss.requires_grad:
            raise InputError(
                f"step {self.state.global_step + 1}: a batch without any image, and stage "
                f"{self.recipe.stage} trains only what images pass through; leave text-only "
                "samples out of `data`"
            )
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One piece of a step: forward and backward."""
        labels = args[2] if len(args) > 2 else kwargs["num_items_in_batch"]  # the whole step's
        self._labelled = (labels > 0) | self._labelled.to(labels.device)
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    @property
    def labelled(self) -> bool:
        """Whether there was anything to learn since this process began."""
        return bool(self._labelled)

    def require_finite(self) -> None:
        """Refuse weights that are not numbers: the last update may have spoilt them.

        Raises:
            InputError: names the step and the first such parameter.
        """
        assert isinstance(self.model, nn.Module)
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        spoilt = torch.stack([~own_share(p).isfinite().all() for _, p in trained])
        counts = self.team.total(*spoilt.tolist())  # each process sees its own share of them
        if any(counts):
            name = next(name for (name, _), count in zip(trained, counts, strict=True) if count)
            raise InputError(
                f"step {self.state.global_step}: after its update {name} is not finite, so it was "
                "not saved. Try a lower learning_rate or a longer warm-up"
            )

    def whole_weights(self) -> dict[str, Any] | None:
        """All weights where processes hold shares of them, put together in the first; else None.

        All processes must ask.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            weights: dict[str, Any] = self.accelerator.get_state_dict(self.model_wrapped)
            return weights
        return None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.team.together():
            self.require_finite()
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with self.team.together(), writing(directory):
                super()._save_checkpoint(*args, **kwargs)
        except InputError:
            shutil.rmtree(directory, ignore_errors=True)  # room for whoever wants to go on
            raise

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called once a step, after its last piece and before the optimizer: the one moment when
        # nothing is spoilt yet and one look (on a GPU, each waits for the queue) covers all.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed has no norm of a step that it left out. The others': the same everywhere.
        norm_value = 0.0 if norm is None else float(norm)
        loss = self.team.total(float(self._step_loss))[0] / self.team.size
        self._step_loss = 0.0
        with self.team.together():
            if math.isfinite(loss) and math.isfinite(norm_value):
                return norm
            raise InputError(
                f"step {self.state.global_step + 1}: the loss is {loss}, the gradient's norm "
                f"{norm_value}; stopped before they reached a weight, and nothing was saved. Try "
                "a lower learning_rate, a longer warm-up, or dtype=float32"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The Trainer does not know models with LoRA in them, only peft's own wrapped around one.
        shared = self.is_fsdp_enabled or self.is_deepspeed_enabled
        assert isinstance(self.model, PreTrainedModel)
        if has_adapter(self.model) and not shared:
            load_adapter_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Going on with a state: all of it or nothing. The Trainer only warns, and does so of tied
        # weights, too, which are saved under one of their names.
        model = self.model
        assert isinstance(model, nn.Module)
        named = dict(model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
        lost = sorted(n for n in missing if n not in named or id(named[n]) not in loaded)
        if lost or load_result.unexpected_keys:
            raise InputError(
                f"{self.args.output_dir} holds the state of another model: missing {lost}, "
                f"unexpected {sorted(load_result.unexpected_keys)}; overwrite=true starts anew"
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the Trainer's estimate walks through all parameters at each step, and leaves out
        the vision encoder."""
        return 0


def share_every_weight(model: nn.Module) -> None:
    """Let each batch pass through every weight, as other processes wait for it there."""
    for module in model.modules():
        if isinstance(module, Owl2Model):
            module.run_all_branches = True


def share_out_precisely(accelerator: Accelerator, half: bool) -> None:
    """Let FSDP2 add up gradients in float32, as DDP does, and keep only shares of them.

    Args:
        half: whether the arithmetic is in bfloat16.
    """
    if half:
        # accelerate's own policy rounds to bfloat16 also the sums over processes and the loss.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    # Else each process holds whole gradients between the pieces of a step: 33 GB of 8 B numbers.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def own_share(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter: its shard under FSDP2 or ZeRO-3, else all of it."""
    shard = getattr(parameter, "ds_tensor", parameter.detach())
    return shard.to_local() if isinstance(shard, DTensor) else shard


def training_arguments(recipe: Recipe, checkpoints: Path, max_steps: int) -> TrainingArguments:
    """A recipe of `max_steps` optimizer steps in the Trainer's terms.

    Raises:
        InputError: the batch cannot be shared out, or the device lacks the precision.
    """
    has_cuda = torch.cuda.is_available()
    precision = recipe.resolve_dtype("cuda" if has_cuda else "cpu")
    if precision == "bfloat16" and has_cuda and not torch.cuda.is_bf16_supported():
        raise InputError("precision: this GPU has no bfloat16; set dtype=float32")
    args = TrainingArguments(
        output_dir=str(checkpoints),
        use_cpu=not has_cuda and not torch.backends.mps.is_available(),
        bf16=precision == "bfloat16",
        max_steps=max_steps,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        # A ratio, not a rate: each group of parameters falls to its own share of its own peak.
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_lr / recipe.learning_rate},
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        # Our loader goes on by itself; the Trainer is not to count batches off.
        ignore_data_skip=True,
        dataloader_pin_memory=has_cuda,
        remove_unused_columns=False,
        # With several processes the model uses every weight.
        ddp_find_unused_parameters=False,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        # Ours is `Owl2Trainer._get_grad_norm`; the Trainer's hides what is not finite.
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        report_to="none",
        disable_tqdm=True,
    )
    devices = args.world_size * recipe.gradient_accumulation_steps
    if recipe.batch_size % devices:
        raise InputError(
            f"batch_size ({recipe.batch_size}) must be a multiple of devices x "
            f"gradient_accumulation_steps ({args.world_size} x {recipe.gradient_accumulation_steps})"
        )
    args.per_device_train_batch_size = recipe.batch_size // devices
    # Else the Trainer would take several GPUs without a launcher as one big one (DataParallel).
    args._n_gpu = min(args.n_gpu, 1)
    return args
