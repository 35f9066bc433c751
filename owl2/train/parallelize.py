"""How the repeated blocks (ViT, abstractor and decoder layers) are computed while they learn.

What the backward pass finds, of each block, by `gradient_checkpointing`:

    false        all that it needs
    "selective"  its input, and what matrix products and attention gave; the rest (norms, rotations,
                 activations, routing) is computed again: little time for about half the memory
    true         its input; all is computed again, for a third more time

`compile` compiles each kind of block once (regional compilation): sizes stay symbols, so batches of
other lengths meet the same code. What stands around the blocks looks at numbers and stays as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from owl2.errors import InputError

ATEN = torch.ops.aten
# What costs more to compute again than to keep.
KEPT = {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
}
# Kinds of block, each with and without gradients, images, a mask, a batch of one: torch gives up
# compiling after 8 of them, and it counts all that pass through the same line of transformers.
VARIANTS = 64


def enable_checkpointing(model: PreTrainedModel, selective: bool = False) -> None:
    """Compute activations again in the backward pass, in all three parts of the model.

    Call it when it is settled what is trained: blocks before the first trained weight keep nothing
    by themselves, and stay as they are.
    """
    how: dict[str, object] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = _selective_contexts
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.16 has the old name only
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)
    # With adapters transformers makes a graph from the words' embeddings on, which only the old
    # kind of checkpointing (reentrant) needs.
    model.disable_input_require_grads()
    for block in _without_graph(model):
        block.gradient_checkpointing = False


def is_checkpointed(model: torch.nn.Module) -> bool:
    """Whether any block is computed again.

    Then autocast should not keep its 16-bit copies of weights from forward to backward, as it does
    by itself: they are as large as the activations that are saved.
    """
    return any(getattr(block, "gradient_checkpointing", False) for block in blocks_of(model))


def _without_graph(model: PreTrainedModel) -> Iterator[GradientCheckpointingLayer]:
    """Blocks that come before the first trained weight, on the way from pixels to words."""
    whole: Any = model.get_submodule("model")
    vision, abstractor = whole.vision_model, whole.visual_abstractor
    path = (
        *(vision.embeddings, *vision.encoder.layers, vision.post_layernorm),
        *(*abstractor.encoder.layers, abstractor),
        *(whole.embed_tokens, *whole.layers),
    )
    trained = abstractor.query_embeds.requires_grad
    for module in path:
        trained = trained or any(weight.requires_grad for weight in module.parameters())
        if not trained and isinstance(module, GradientCheckpointingLayer):
            yield module


def _selective_contexts() -> tuple[object, object]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(
    context: object, operation: object, *args: object, **kwargs: object
) -> CheckpointPolicy:
    kept = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks: layers of the ViT, the abstractor and the decoder."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Let torch compile the blocks, in place, when they are first used; names stay as they are.

    To be called before something that shares out weights (FSDP2) wraps them.
    """
    from torch._functorch import config

    functorch: Any = config  # whose options differ from version to version
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    # Of graphs that hold their own backward pass, as a block's never do. torch 2.13 looks for it in
    # a block that has nothing to learn, too, and refuses attention there as it might draw numbers.
    if hasattr(functorch, "remat_using_tags_for_fwd_loss_bwd_graph"):
        functorch.remat_using_tags_for_fwd_loss_bwd_graph = False
    for block in blocks_of(model):
        block.compile(dynamic=True, backend=backend)


def require_compiler(kind: str) -> None:
    """Refuse to compile where torch finds nothing to compile with, before weights are read.

    Args:
        kind: of the device that computes: "cuda", "cpu" …

    Raises:
        InputError: no C++ compiler, or on a GPU no Triton.
    """
    if kind == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise InputError("compile: this GPU's compiler, Triton, is missing; set compile=false")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "compile: there is no C++ compiler; install g++, or set compile=false"
        ) from error
