"""Training steps of the baseline and of owl2: forward, backward, gradient clipping, AdamW.

Both train the same weights in the same precision. Each has its own optimizer; the baseline uses
torch's default one.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from owl2.bench.baseline import Baseline
from owl2.bench.presets import BenchModel
from owl2.bench.workload import TrainingBatches, Workload
from owl2.train.optimizer import make_adamw, parameter_groups
from owl2.train.parallelize import enable_checkpointing, is_checkpointed
from owl2.train.recipe import Checkpointing

LEARNING_RATE = 1e-6  # small enough that random data does no harm in a hundred steps


class TrainingSteps:
    """Steps over one batch, as `owl2 train` computes them.

    All parameters are trained. They are float32; a 16-bit dtype means autocast, for the baseline as
    well, since the authors' scripts train in this way.

    Args:
        checkpointing: the recipe's `gradient_checkpointing`.
    """

    def __init__(self, source: BenchModel, checkpointing: Checkpointing = "selective") -> None:
        device, dtype = source.device_and_dtype()
        self.autocast_dtype = None if dtype == torch.float32 else dtype
        self.model = replace(source, dtype="float32").load().requires_grad_(True).train()
        self.batches = TrainingBatches.create(Workload(self.model.config, device, torch.float32))
        self.baseline = Baseline(self.model)  # stores all activations
        if checkpointing:
            enable_checkpointing(self.model, selective=checkpointing == "selective")
        self.parameters = list(self.model.parameters())
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def baseline_step(self) -> float:
        """The baseline's step: padded batch, all logits."""
        return self._step(
            "baseline",
            lambda: self.baseline.loss(**self.batches.padded),
            lambda: torch.optim.AdamW(self.parameters, lr=LEARNING_RATE),
        )

    def padded_step(self) -> float:
        """owl2's step on the padded batch."""
        return self._owl2_step(self.batches.padded)

    def packed_step(self) -> float:
        """owl2's step on the packed batch."""
        return self._owl2_step(self.batches.packed)

    def _owl2_step(self, batch: dict[str, torch.Tensor]) -> float:
        def make_optimizer() -> torch.optim.Optimizer:
            groups = parameter_groups(
                self.model,
                learning_rate=LEARNING_RATE,
                weight_decay=0.0,
                vision_lr_layer_decay=0.9,
            )
            return make_adamw(groups, betas=(0.9, 0.95), epsilon=1e-8)

        return self._step(
            "owl2",
            lambda: self.model(**batch, use_cache=False, return_logits=False).loss,
            make_optimizer,
        )

    def _step(
        self,
        name: str,
        compute_loss: Callable[[], torch.Tensor],
        make_optimizer: Callable[[], torch.optim.Optimizer],
    ) -> float:
        if name not in self._optimizers:
            self._optimizers[name] = make_optimizer()
        with torch.autocast(
            self.model.device.type,
            self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
            cache_enabled=not is_checkpointed(self.model),
        ):
            loss = compute_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizers[name].step()
        self._optimizers[name].zero_grad()
        return float(loss.detach())
