"""A training step without numbers: bytes that live and FLOPs that pass, operation by operation.

    model on the meta device ──► forward, backward, as the trainer does them ──► Trace
                                   └─ a ledger sees every operation: its FLOPs, the storages it
                                      makes, and when the last user of a storage lets it go

Fake tensors have a shape and a dtype but no memory, so a model of any size is traced in seconds, on
a machine of any size. What autograd keeps, what activation checkpointing drops and computes again,
the 16-bit copies that autocast makes of weights: all of it is the real code's doing, nothing is
estimated here. What the trace cannot see is what kernels need inside themselves.

A trace is made with fake CPU tensors, also for GPUs: PyTorch built for CPUs cannot make fake CUDA
tensors. The operations and their dtypes are the same, apart from the norm inside the abstractor's
MLP, which autocast computes in float32 on GPUs.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from owl2.model.loss import chunked_cross_entropy
from owl2.model.modality import Routing
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.parallelize import is_checkpointed


class Held(StrEnum):
    """What memory is held for."""

    WEIGHTS = "weights"
    COPIES = "16-bit copies of weights"
    GRADIENTS = "gradients"
    BATCH = "batch"
    VISION = "activations, vision encoder"
    ABSTRACTOR = "activations, abstractor"
    DECODER = "activations, decoder"
    LOGITS = "activations, logits and loss"
    BACKWARD = "backward pass"


HELD = tuple(Held)
ACTIVATIONS = (Held.VISION, Held.ABSTRACTOR, Held.DECODER, Held.LOGITS)


@dataclass(frozen=True)
class Shape:
    """What one device computes at a time: `rows` sequences of `length` tokens, with `images` in
    all of them together; `passes` such pieces before the optimizer steps."""

    rows: int
    length: int
    images: int
    passes: int = 1


@dataclass(frozen=True)
class Trace:
    """What a step was seen to hold and to compute.

    Attributes:
        held: (operations, len(HELD)) bytes that live after each operation.
        flops: of one pass, by what they were done for; a multiplication and an addition are two.
    """

    held: np.ndarray
    flops: dict[Held, int]

    def peak(self, scales: dict[Held, float] | None = None) -> dict[Held, int]:
        """The bytes held at the moment when their sum is largest.

        Args:
            scales: factors by which some of it counts, e.g. gradients shared out to 8 devices 1/8.
        """
        factors = np.array([(scales or {}).get(kind, 1.0) for kind in HELD])
        scaled = self.held * factors
        row = scaled[scaled.sum(1).argmax()]
        return {kind: int(size) for kind, size in zip(HELD, row, strict=True)}

    @property
    def forward_flops(self) -> int:
        """FLOPs of a forward pass."""
        return sum(count for kind, count in self.flops.items() if kind is not Held.BACKWARD)

    @property
    def all_flops(self) -> int:
        """FLOPs of a forward and a backward pass with what it computes again."""
        return sum(self.flops.values())


def trace_step(
    model: Owl2ForConditionalGeneration, shape: Shape, *, autocast: bool = False
) -> Trace:
    """What a training step of this shape holds and computes, the optimizer apart.

    Args:
        model: on the meta device, with parameters frozen or not and activation checkpointing
            switched on or not, as the trainer has it. It is of no use for anything else afterwards.
        autocast: compute in bfloat16, as the trainer does on GPUs; else in the weights' dtype.
    """
    with FakeTensorMode():
        _make_fake(model)
        model.train()
        if shape.passes > 1:  # what a pass holds most of all, a later one does: beside gradients
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        ledger = Ledger(model)
        with ledger:
            _one_pass(model, shape, autocast, ledger)
    return Trace(np.array(ledger.timeline, dtype=np.int64), dict(ledger.flops))


def _make_fake(model: nn.Module) -> None:
    """Put fake tensors in the place of all meta tensors: those have no device of their own, and
    without one there is neither autocast nor fused attention."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if id(tensor) not in made:  # tied weights stay tied
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = (
                    nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                )
            setattr(module, name, made[id(tensor)])


def _one_pass(
    model: Owl2ForConditionalGeneration, shape: Shape, autocast: bool, ledger: "Ledger"
) -> None:
    ledger.purpose = Held.BATCH
    batch = _Batch.of(model, shape)

    def forward() -> dict[str, torch.Tensor]:
        return _forward(model, batch, ledger)

    computed: Callable[[], dict[str, torch.Tensor]] = forward
    if autocast:  # the two wrappers that accelerate puts around a model's forward
        keeps = not is_checkpointed(model)
        cast = torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps)
        computed = convert_outputs_to_fp32(cast(forward))
    loss = computed()["loss"]
    ledger.purpose = Held.BACKWARD
    loss.backward()


def _forward(
    model: Owl2ForConditionalGeneration, batch: "_Batch", ledger: "Ledger"
) -> dict[str, torch.Tensor]:
    """`Owl2ForConditionalGeneration.forward`, less what looks at the numbers: there are none."""
    ledger.purpose = Held.DECODER
    embeddings = model.model.embed_tokens(batch.input_ids)
    if batch.pixel_values is not None:
        ledger.purpose = Held.VISION
        features = model.model.vision_model(batch.pixel_values)
        ledger.purpose = Held.ABSTRACTOR
        images = model.model.visual_abstractor(features)
        ledger.purpose = Held.DECODER
        embeddings = embeddings.masked_scatter(batch.is_image[..., None], images.to(embeddings))
    hidden = model.model(
        inputs_embeds=embeddings,
        attention_mask=batch.attention_mask,
        routing=batch.routing,
        use_cache=False,
    ).last_hidden_state
    ledger.purpose = Held.LOGITS
    rows, targets = torch.zeros_like(batch.targets), batch.targets
    return {"loss": chunked_cross_entropy(model.lm_head, hidden, rows, targets, len(targets))}


@dataclass(frozen=True)
class _Batch:
    """Inputs of a step: (B, S) tokens, N images; padded, so attention has a mask.

    `targets` (T,): as many labels as there can be, one at each word but a sequence's first.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    is_image: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor | None
    routing: Routing | None

    @classmethod
    def of(cls, model: Owl2ForConditionalGeneration, shape: Shape) -> "_Batch":
        config, size = model.config, (shape.rows, shape.length)
        whole = torch.zeros(size, dtype=torch.long)
        tokens, visual = whole.numel(), shape.images * config.num_image_tokens
        routing, pixels = None, None
        if shape.images:
            rows = whole.new_zeros(tokens)
            sizes = tokens - visual, visual
            routing = Routing(rows, rows, sizes) if config.use_mam else None
            channels = config.visual_config.visual_model.num_channels
            pixels = torch.zeros(shape.images, channels, config.image_size, config.image_size)
        return cls(
            input_ids=whole,
            targets=whole.new_zeros(max(0, tokens - shape.rows - visual)),
            is_image=whole.bool(),
            attention_mask=torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool),
            pixel_values=pixels,
            routing=routing,
        )


# torch knows the FLOPs of the GPU's fused attention only; causal attention counts whole in both.
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flops_of(packet: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """FLOPs of one operation: of matrix products, convolutions and attention; 0 for all others."""
    if packet is FUSED:
        query, key, value = args[:3]
        return sdpa_flop_count(query.shape, key.shape, value.shape)
    if packet is FUSED_BACKWARD:
        grad, query, key, value = args[:4]
        return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


class Ledger(TorchDispatchMode):
    """Keeps the sum of living storages by purpose, over time, and counts FLOPs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.purpose = Held.WEIGHTS
        self.timeline: list[tuple[int, ...]] = []
        self.flops: dict[Held, int] = {}
        self._sums = dict.fromkeys(HELD, 0)
        self._purposes: dict[int, Held] = {}
        self._weights: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self._weights.add(self._enter(tensor))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._is_gradient)
            if parameter.grad is not None:
                self._enter(parameter.grad, Held.GRADIENTS)
        self._note()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [item for item in tree_leaves(result) if isinstance(item, torch.Tensor)]
        copied = func._overloadpacket is torch.ops.aten._to_copy and self._is_weight(args[0])
        for tensor in made:
            self._enter(tensor, Held.COPIES if copied else self.purpose)
        count = flops_of(func._overloadpacket, args, kwargs or {}, result)
        self.flops[self.purpose] = self.flops.get(self.purpose, 0) + count
        if made:
            self._note()
        return result

    def _enter(self, tensor: torch.Tensor, purpose: Held = Held.WEIGHTS) -> int:
        """Count a tensor's storage, unless it is counted; its key."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._purposes:
            self._purposes[key] = purpose
            self._sums[purpose] += storage.nbytes()
            weakref.finalize(storage, self._leave, key, storage.nbytes())
        return key

    def _leave(self, key: int, size: int) -> None:
        self._sums[self._purposes.pop(key)] -= size

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _is_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # this is called when it has been accumulated
        storage = parameter.grad.untyped_storage()
        before = self._purposes[storage._cdata]
        self._purposes[storage._cdata] = Held.GRADIENTS
        self._sums[before] -= storage.nbytes()
        self._sums[Held.GRADIENTS] += storage.nbytes()
        self._note()

    def _note(self) -> None:
        self.timeline.append(tuple(self._sums.values()))
