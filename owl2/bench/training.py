"""A training step, by the textbook and by the project: forward, backward, clipping, AdamW.

The two learn the same weights in the same precision; each has an optimizer of its own, the
textbook's being torch's default.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from owl2.bench.baseline import Textbook
from owl2.bench.presets import Origin
from owl2.bench.workload import Batches, Workload
from owl2.train.optimizer import make_adamw, parameter_groups
from owl2.train.parallelize import enable_checkpointing, is_checkpointed
from owl2.train.recipe import Checkpointing

RATE = 1e-6  # so small that random data does no harm in a hundred steps


class Training:
    """Steps over the same batch, again and again, as `owl2 train` computes by itself.

    All weights are trained. For 16 bits they are float32, with autocast around the arithmetic, for
    the textbook, too: so the authors' scripts train.

    Args:
        checkpointing: the project's `gradient_checkpointing`.
    """

    def __init__(self, origin: Origin, checkpointing: Checkpointing = "selective") -> None:
        device, dtype = origin.place()
        self.half = None if dtype == torch.float32 else dtype
        self.model = replace(origin, dtype="float32").load().requires_grad_(True).train()
        self.batches = Batches.of(Workload(self.model.config, device, torch.float32))
        self.textbook = Textbook(self.model)  # which keeps all activations
        if checkpointing:
            enable_checkpointing(self.model, selective=checkpointing == "selective")
        self.parameters = list(self.model.parameters())
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def textbook_step(self) -> float:
        """Padded, with all logits."""
        return self._step(
            "textbook",
            lambda: self.textbook.loss(**self.batches.padded),
            lambda: torch.optim.AdamW(self.parameters, lr=RATE),
        )

    def padded_step(self) -> float:
        """The project's, over the padded batch."""
        return self._own_step(self.batches.padded)

    def packed_step(self) -> float:
        """The project's, over the packed batch."""
        return self._own_step(self.batches.packed)

    def _own_step(self, batch: dict[str, torch.Tensor]) -> float:
        return self._step(
            "owl2",
            lambda: self.model(**batch, use_cache=False, return_logits=False).loss,
            self._adamw,
        )

    def _adamw(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = parameter_groups(
            self.model, learning_rate=RATE, weight_decay=0.0, vision_layer_decay=0.9
        )
        return make_adamw(groups, betas=(0.9, 0.95), epsilon=1e-8)

    def _step(
        self,
        who: str,
        loss_of: Callable[[], torch.Tensor],
        make_optimizer: Callable[[], torch.optim.Optimizer],
    ) -> float:
        if who not in self._optimizers:
            self._optimizers[who] = make_optimizer()
        kind = self.model.device.type
        with torch.autocast(
            kind,
            self.half or torch.bfloat16,
            enabled=self.half is not None,
            cache_enabled=not is_checkpointed(self.model),
        ):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizers[who].step()
        self._optimizers[who].zero_grad()
        return float(loss.detach())
