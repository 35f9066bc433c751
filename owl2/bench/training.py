"""Training steps of the baseline and of owl2, and their peak memory.

A step is forward, backward, gradient clipping and AdamW. Both implementations train the same
weights in the same precision, each with its own optimizer; the baseline uses torch's default one.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import psutil
import torch

from owl2.bench.baseline import as_baseline
from owl2.bench.presets import BenchModel
from owl2.bench.workload import Workload
from owl2.memory import peak_resident_memory
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.optimizer import make_adamw, parameter_groups
from owl2.train.parallelize import enable_checkpointing, is_checkpointed
from owl2.train.recipe_sections import Checkpointing

LEARNING_RATE = 1e-6  # small enough that random data does no harm in a hundred steps
NUM_MEMORY_STEPS = 2  # the first one creates the optimizer states


class MeasurementError(Exception):
    """A case that cannot be measured on this machine."""


class TrainingSteps:
    """Steps over one batch, as `owl2 train` computes them.

    All parameters are trained. They are float32; a 16-bit dtype means autocast, for the baseline as
    well, since the authors' scripts train in this way.

    Args:
        checkpointing: The recipe's `gradient_checkpointing`. The baseline stores all activations.
    """

    def __init__(self, source: BenchModel, checkpointing: Checkpointing = "selective") -> None:
        device, self.dtype = source.device_and_dtype()
        self.model = replace(source, dtype="float32").load().requires_grad_(True).train()
        self.baseline = as_baseline(self.model).requires_grad_(True).train()
        self.batches = Workload(self.model.config, device, torch.float32).training_batches()
        if checkpointing:
            enable_checkpointing(self.model, selective=checkpointing == "selective")
        rates = {"learning_rate": LEARNING_RATE, "weight_decay": 0.0, "vision_lr_layer_decay": 0.9}
        self._adamw = make_adamw(
            parameter_groups(self.model, **rates), betas=(0.9, 0.95), epsilon=1e-8
        )
        self._baseline_adamw = torch.optim.AdamW(self.baseline.parameters(), lr=LEARNING_RATE)

    def baseline_step(self) -> None:
        """The baseline's step: padded batch, all logits."""
        self._step(self.baseline, self._baseline_adamw, self.batches["padded"])

    def step(self, layout: str = "padded") -> None:
        """owl2's step on the padded or the packed batch."""
        self._step(self.model, self._adamw, self.batches[layout], return_logits=False)

    def _step(
        self,
        model: Owl2ForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        batch: dict[str, torch.Tensor],
        **options: bool,
    ) -> None:
        is_16_bit = self.dtype != torch.float32
        with torch.autocast(
            model.device.type,
            self.dtype if is_16_bit else torch.bfloat16,
            enabled=is_16_bit,
            cache_enabled=not is_checkpointed(model),
        ):
            loss = model(**batch, use_cache=False, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# The steps whose memory is measured, with their `gradient_checkpointing`.
MEMORY_STEPS: dict[str, tuple[Checkpointing, Callable[[TrainingSteps], None]]] = {
    "baseline": (False, TrainingSteps.baseline_step),
    "owl2": ("selective", TrainingSteps.step),
    "no_checkpointing": (False, TrainingSteps.step),
    "full_checkpointing": (True, TrainingSteps.step),
}


def measure_memory(name: str, source: BenchModel) -> float:
    """Peak bytes of two training steps, a key of `MEMORY_STEPS`, in a process of their own.

    On a CPU, the peak resident memory less that before the model was created: weights, gradients,
    optimizer states, activations and everything else. On a GPU, the peak memory of tensors.

    Raises:
        MeasurementError: The process failed, for example because memory ran out.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(peak_step_bytes, name, source).result()
    except (RuntimeError, MemoryError) as error:  # also BrokenProcessPool
        raise MeasurementError(f"the process for {name} failed: {error}") from error


def peak_step_bytes(name: str, source: BenchModel) -> float:
    """See `measure_memory`; this process must be a new one."""
    before = psutil.Process().memory_info().rss
    checkpointing, step = MEMORY_STEPS[name]
    training = TrainingSteps(source, checkpointing)
    for _ in range(NUM_MEMORY_STEPS):
        step(training)
    if training.model.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(training.model.device))
    return float(peak_resident_memory() - before)
