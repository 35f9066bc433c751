"""Trace a training step on fake tensors: live bytes and FLOPs, operation by operation.

    model on the meta device ──► forward and backward pass as in training ──► StepTrace
                                   └─ MemoryTracker sees each operation: its FLOPs, the storages
                                      that it allocates, and when each storage is freed

Fake tensors have a shape and a dtype but no data, so a step of a model of any size is traced in
seconds on any machine. Saved activations, activation checkpointing and the 16-bit copies of weights
under autocast come from the real code. The workspaces inside kernels are not visible.

FLOPs come from torch's registry of formulas. torch's own tracker
(`torch.distributed._tools.mem_tracker.MemTracker`, torch 2.13) cannot replace `MemoryTracker`: it
fails on frozen parameters (stage 1, LoRA) and on a module that is called several times (`lm_head`,
once per chunk of the loss), and it reports only the unsharded peak.

The fake tensors are CPU tensors also for GPUs, because a CPU build of PyTorch has no fake CUDA
tensors. Operations and dtypes are the same, except for the norm inside the MLP of the abstractor,
which autocast computes in float32 on GPUs.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.model.configuration import Owl2Config
from owl2.model.loss import chunked_cross_entropy
from owl2.model.modality import Routing
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.registry import get_model_type
from owl2.processing.anchor_crops import ANCHORS
from owl2.train.parallelize import is_checkpointed


class MemoryKind(StrEnum):
    """What memory is used for."""

    WEIGHTS = "weights"
    COPIES = "16-bit copies of weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer states"  # not in a trace
    VISION = "activations, vision encoder"
    ABSTRACTOR = "activations, abstractor"
    DECODER = "activations, decoder"
    LOGITS = "activations, logits and loss"
    BACKWARD = "backward pass"  # recomputed activations and gradients of activations
    COMMUNICATION = "gathered layers, buckets"  # not in a trace
    BATCH = "batch"
    PROCESS = "Python and libraries"  # not in a trace


KINDS = tuple(MemoryKind)


@dataclass(frozen=True)
class BatchShape:
    """The micro-batch of one device: `rows` sequences of `length` tokens with `images` in total;
    `micro_batches` of them per optimizer step."""

    rows: int
    length: int
    images: int
    micro_batches: int = 1


@dataclass(frozen=True)
class StepTrace:
    """The memory and the FLOPs of a traced step.

    Attributes:
        memory: (operations, len(KINDS)) live bytes after each operation.
        flops: FLOPs of one micro-batch by kind; a multiply-add counts as two.
    """

    memory: np.ndarray
    flops: Counter[MemoryKind]

    def peak(self, scales: dict[MemoryKind, float] | None = None) -> Counter[MemoryKind]:
        """The live bytes by kind at the moment when their sum is largest.

        Args:
            scales: Factors for some kinds, e.g. 1/8 for gradients sharded over 8 devices.
        """
        factors = np.array([(scales or {}).get(kind, 1.0) for kind in KINDS])
        scaled = self.memory * factors
        row = scaled[scaled.sum(1).argmax()]
        return Counter({kind: int(size) for kind, size in zip(KINDS, row, strict=True)})


class TracedQuantizedLinear(QuantizedLinear):
    """A quantized Linear without values: the dequantized weight is one tensor, as with kernels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As in training."""
        return self.forward_with_gradients(x)

    def dequantize(self, dtype: torch.dtype, use_kernels: bool = False) -> torch.Tensor:
        """See `QuantizedLinear`."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype)


def trace_step(
    model: Owl2ForConditionalGeneration, shape: BatchShape, *, autocast: bool = False
) -> StepTrace:
    """Trace the forward and backward pass of a micro-batch, without the optimizer.

    Args:
        model: On the meta device, with frozen parameters and activation checkpointing as in
            training. Its parameters are replaced, so it cannot be used afterwards.
        autocast: Compute in bfloat16 by autocast, else in the dtype of the weights.
    """
    grids = _image_grids(model.config, shape.images)  # its values are read
    with FakeTensorMode():
        fakes: dict[int, torch.Tensor] = {}  # tied weights stay tied
        for module in model.modules():
            # Meta tensors support neither autocast nor fused attention.
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                setattr(module, name, fakes.get(id(tensor)))
        model.train()
        if shape.micro_batches > 1:  # the peak is in a later one, next to existing gradients
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        with MemoryTracker(model) as tracker:
            _forward_backward(model, shape, grids, autocast, tracker)
    return StepTrace(np.array(tracker.timeline, dtype=np.int64), tracker.flops)


def _image_grids(config: Owl2Config, images: int) -> tuple[torch.Tensor, ...]:
    """The `image_grids` (N, 2) of DocOwl2, whose pages have the largest number of crops."""
    if not (config.visual_config.has_image_grids and images):
        return ()
    anchors = get_model_type(config.registry_key).image_options["anchors"]
    return (torch.tensor([max(ANCHORS[anchors], key=prod)] * images),)


def _forward_backward(
    model: Owl2ForConditionalGeneration,
    shape: BatchShape,
    grids: tuple[torch.Tensor, ...],
    autocast: bool,
    tracker: "MemoryTracker",
) -> None:
    """The forward pass of `Owl2ForConditionalGeneration` without its checks of values, which fake
    tensors do not have; then the backward pass.

    The batch is padded, so attention has a mask; all positions that can have a label have one.
    """
    config, core = model.config, model.model
    tracker.kind = MemoryKind.BATCH
    input_ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    is_image = input_ids.bool()
    mask = torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool)
    visual = shape.images * config.num_image_tokens
    text = input_ids.numel() - visual
    targets = input_ids.new_zeros(max(0, text - shape.rows))
    routing, pixel_values = None, None
    if shape.images:
        rows = input_ids.new_zeros(input_ids.numel())
        routing = Routing(rows, rows, (text, visual)) if config.use_mam else None
        crops = [1 + prod(grid) for pages in grids for grid in pages.tolist()]
        count = sum(crops) or shape.images
        channels = config.visual_config.visual_model.num_channels
        pixel_values = torch.zeros(count, channels, config.image_size, config.image_size)

    def forward() -> dict[str, torch.Tensor]:
        tracker.kind = MemoryKind.DECODER
        embeddings = core.embed_tokens(input_ids)
        if pixel_values is not None:
            tracker.kind = MemoryKind.VISION
            features = core.vision_model(pixel_values)
            tracker.kind = MemoryKind.ABSTRACTOR
            images = core.visual_abstractor(features, *grids)
            tracker.kind = MemoryKind.DECODER
            embeddings = embeddings.masked_scatter(is_image[..., None], images.to(embeddings))
        hidden = core(
            inputs_embeds=embeddings, attention_mask=mask, routing=routing, use_cache=False
        ).last_hidden_state
        tracker.kind = MemoryKind.LOGITS
        rows = torch.zeros_like(targets)
        return {"loss": chunked_cross_entropy(model.lm_head, hidden, rows, targets, len(targets))}

    if autocast:  # as accelerate wraps the forward pass
        keep_copies = not is_checkpointed(model)
        wrapper = torch.autocast("cpu", torch.bfloat16, cache_enabled=keep_copies)
        loss = convert_outputs_to_fp32(wrapper(forward))()["loss"]
    else:
        loss = forward()["loss"]
    tracker.kind = MemoryKind.BACKWARD
    loss.backward()


# torch has formulas for fused attention on GPUs only. Causal attention counts fully in both.
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOP_FORMULAS = {
    **flop_registry,
    FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    FUSED_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}


class MemoryTracker(TorchDispatchMode):
    """Records the live bytes by kind after each operation, and counts FLOPs.

    Attributes:
        kind: The kind of new storages and FLOPs; the caller sets it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kind = MemoryKind.WEIGHTS
        self.timeline: list[tuple[int, ...]] = []
        self.flops: Counter[MemoryKind] = Counter()
        self._sums = dict.fromkeys(KINDS, 0)
        self._kinds: dict[int, MemoryKind] = {}
        self._weights = {self._add(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
            if parameter.grad is not None:
                self._add(parameter.grad, MemoryKind.GRADIENTS)
        self.timeline.append(tuple(self._sums.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        is_copy = (
            packet is torch.ops.aten._to_copy and args[0].untyped_storage()._cdata in self._weights
        )
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, MemoryKind.COPIES if is_copy else self.kind)
        if packet in FLOP_FORMULAS:  # a matrix product, convolution or attention
            self.flops[self.kind] += FLOP_FORMULAS[packet](*args, **kwargs or {}, out_val=result)
        self.timeline.append(tuple(self._sums.values()))
        return result

    def _add(self, tensor: torch.Tensor, kind: MemoryKind = MemoryKind.WEIGHTS) -> int:
        """Count the storage of a tensor once; returns the key of the storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._kinds:
            self._kinds[key] = kind
            self._sums[kind] += storage.nbytes()
            weakref.finalize(storage, self._remove, key, storage.nbytes())
        return key

    def _remove(self, key: int, size: int) -> None:
        self._sums[self._kinds.pop(key)] -= size

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # called after it has been accumulated
        storage = parameter.grad.untyped_storage()
        self._sums[self._kinds[storage._cdata]] -= storage.nbytes()
        self._kinds[storage._cdata] = MemoryKind.GRADIENTS
        self._sums[MemoryKind.GRADIENTS] += storage.nbytes()
        self.timeline.append(tuple(self._sums.values()))
