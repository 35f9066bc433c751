"""Activation checkpointing, compilation and attention of the repeated blocks (ViT, abstractor and
decoder layers) in training.

`gradient_checkpointing` decides which activations of a block are saved for the backward pass:

    false        all
    "selective"  the input and the results of matrix products and attention; norms, rotations,
                 activation functions and routing are recomputed: about half the memory, little time
    true         the input; everything is recomputed: a third more time

`compile` compiles each kind of block once (regional compilation) with symbolic sizes, so batches of
other lengths use the same code. The code around the blocks depends on values and stays eager.

`attn_implementation`: eager and sdpa run everywhere and separate packed samples by a dense mask
(rows, S, S). flex_attention has a block-sparse mask; PyTorch has its backward pass on GPUs only.
flash_attention_2 takes the lengths of the samples of one row. It needs a GPU, bfloat16 and the
package flash-attn.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import is_flash_attn_2_available

from owl2.errors import ErrorCode, InputError
from owl2.train.recipe import Recipe

ATEN = torch.ops.aten
# Results that cost more to recompute than to save.
SAVED_OPERATIONS = [
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
]
# A block is compiled with and without gradients, images, a mask, and for a batch of one. torch
# stops after 8 compilations, and counts all blocks that pass the same line of transformers.
RECOMPILE_LIMIT = 64


def enable_checkpointing(model: PreTrainedModel, selective: bool = False) -> None:
    """Enable activation checkpointing in all three parts of the model.

    Call it after the parameters have been frozen: blocks before the first trainable parameter save
    nothing anyway and are skipped.
    """
    options: dict[str, object] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, SAVED_OPERATIONS)
    if hasattr(model, "activation_checkpointing_enable"):  # not in transformers 5.16
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    # With adapters transformers requires gradients of the embeddings, which only reentrant
    # checkpointing needs.
    model.disable_input_require_grads()
    for block in _blocks_without_gradients(model):
        block.gradient_checkpointing = False


def is_checkpointed(model: torch.nn.Module) -> bool:
    """Whether any block is checkpointed.

    Autocast should then not cache the 16-bit copies of weights from the forward to the backward
    pass: they are as large as the saved activations.
    """
    return any(getattr(block, "gradient_checkpointing", False) for block in blocks_of(model))


def _blocks_without_gradients(model: PreTrainedModel) -> Iterator[GradientCheckpointingLayer]:
    """Blocks before the first trainable parameter in the order of the forward pass."""
    core: Any = model.get_submodule("model")
    vision, abstractor = core.vision_model, core.visual_abstractor
    path = (
        *(*_modules_inside(vision), *_modules_inside(abstractor), abstractor),
        *(core.embed_tokens, *core.layers),
    )
    # The learnable queries are the input of the abstractor.
    trainable = any(weight.requires_grad for weight in abstractor.parameters(recurse=False))
    for module in path:
        trainable = trainable or any(weight.requires_grad for weight in module.parameters())
        if not trainable and isinstance(module, GradientCheckpointingLayer):
            yield module


def _modules_inside(part: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of the vision encoder or the connector, without those that contain blocks."""
    blocks = set(blocks_of(part))
    return [
        module
        for module in part.modules()
        if module in blocks or not any(inner in blocks for inner in module.modules())
    ]


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks: layers of the ViT, the abstractor and the decoder."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks in place at their first use; parameter names do not change.

    Call it before FSDP2 wraps the blocks.
    """
    from torch._functorch import config

    functorch: Any = config  # its options differ between versions
    limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.recompile_limit = limit
    # For graphs that contain their own backward pass, which those of blocks do not. torch 2.13
    # applies it to blocks without gradients too, and then refuses attention as random.
    if hasattr(functorch, "remat_using_tags_for_fwd_loss_bwd_graph"):
        functorch.remat_using_tags_for_fwd_loss_bwd_graph = False
    for block in blocks_of(model):
        block.compile(dynamic=True, backend=backend)


def require_compiler(device_type: str) -> None:
    """Check before weights are loaded that torch can compile for "cuda", "cpu", ...

    Raises:
        InputError: No C++ compiler, or no Triton for a GPU.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        if device_type != "cuda":
            get_cpp_compiler()
        elif not has_triton():
            raise InputError(
                "compile: Triton is not installed or does not support this GPU; set compile=false",
                ErrorCode.MISSING_DEPENDENCY,
            )
    except InvalidCxxCompiler as error:
        raise InputError(
            "compile: no C++ compiler found; install g++, or set compile=false",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error


def require_attention(recipe: Recipe) -> None:
    """Check before weights are loaded that this machine has the recipe's attention backend.

    Raises:
        InputError: No GPU, no flash-attn, or a dtype that is not bfloat16.
    """
    name = recipe.attn_implementation
    if name not in ("flash_attention_2", "flex_attention"):
        return
    problem, code = "", ErrorCode.UNSUPPORTED
    if not torch.cuda.is_available():
        problem = "trains on a GPU only"
    elif name == "flash_attention_2":
        # transformers uses either of the two packages.
        if not is_flash_attn_2_available() and importlib.util.find_spec("kernels") is None:
            problem = "needs flash-attn (pip install flash-attn)"
            code = ErrorCode.MISSING_DEPENDENCY
        elif recipe.resolve_dtype("cuda") != "bfloat16":
            problem, code = "needs dtype=bfloat16", ErrorCode.CONFLICT
    if problem:
        raise InputError(
            f"attn_implementation: {name} {problem}; or set attn_implementation=sdpa", code
        )
