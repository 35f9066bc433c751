"""The modality-adaptive module (MAM): norms and projections with separate weights per modality.

Specification §1.3. Shapes: B sequences, S positions, D features; B · S tokens, T of them text and
V visual.

The modality of a token is the same in every layer, so a forward pass computes one `Routing` and
passes it to all layers. A step without visual tokens has no routing (None): each module then uses
only its text weight, as a plain LLaMA does. With gradients the routing has V = 0, and those of
the visual weights are zeros if text weights have some: DDP requires that every process uses the
same weights. In sharded training (`always`) the visual weights are used in any case.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

TEXT, VISUAL = 0, 1
# Arguments of PEFT's hooks: an adapter, or the start of one, for each of the B sequences.
PER_SEQUENCE = {"adapter_names", "alora_offsets"}

ModalitySplit = tuple[torch.Tensor, torch.Tensor]  # the text and the visual tokens


class Routing(NamedTuple):
    """Positions of the tokens of each modality in the flattened batch.

    Attributes:
        grouped: (B·S,) rows of all text tokens, followed by the rows of all visual tokens.
        order: (B·S,) inverse permutation of `grouped`.
        sizes: T and V.
        always: Use the visual modules although V = 0 and nothing else has a gradient.
    """

    grouped: torch.Tensor
    order: torch.Tensor
    sizes: tuple[int, int]
    always: bool = False

    @classmethod
    def of(
        cls,
        token_types: torch.Tensor,
        num_visual: int | None = None,
        always: bool = False,
        masked: bool = False,
    ) -> "AnyRouting | None":
        """The routing for modalities (B, S), 0 for text and 1 for visual tokens.

        Args:
            num_visual: The number of visual positions. By default they are counted, which
                synchronizes with a GPU.
            always: Use the visual modules also if there are no visual tokens.
            masked: Return a `MaskedRouting`, for modules that process complete sequences.

        Returns:
            None if there are no visual tokens, `always` is False, and gradients are off. While
            `torch.compile` or `torch.export` traces the model, a `MaskedRouting`: T and V are
            unknown then.
        """
        if is_tracing(token_types):
            return MaskedRouting(token_types == VISUAL)
        is_visual = token_types.flatten() == VISUAL
        if num_visual is None:
            num_visual = int(is_visual.sum())
        if not num_visual and not always and not torch.is_grad_enabled():
            return None
        if masked:
            return MaskedRouting(token_types == VISUAL)
        # A sort and not `nonzero`, whose result size depends on the data and synchronizes a GPU.
        grouped = is_visual.argsort(stable=True)
        return cls(grouped, grouped.argsort(), (len(grouped) - num_visual, num_visual), always)

    def split(self, hidden_states: torch.Tensor) -> ModalitySplit:
        """Split (B, S, D) into text tokens (T, D) and visual tokens (V, D).

        Without visual tokens (V = 0), one row (1, D) replaces them, since some adapters cannot
        process an empty tensor. `join` ignores its result.
        """
        if not self.sizes[VISUAL]:
            rows = hidden_states.flatten(0, 1)
            return rows, rows[:1].detach()
        rows = PermuteRows.apply(hidden_states.flatten(0, 1), self.grouped, self.order)
        text, visual = rows.split(self.sizes)
        return text, visual

    def join(self, parts: ModalitySplit, batch_size: int) -> torch.Tensor:
        """Inverse of `split`: (T, D) and (V, D) to (B, S, D)."""
        rows = parts[TEXT]
        if self.sizes[VISUAL]:
            rows = PermuteRows.apply(torch.cat(parts), self.order, self.grouped)
        elif rows.requires_grad or self.always:
            rows = WithoutVisual.apply(*parts)
        return rows.unflatten(0, (batch_size, -1))


class MaskedRouting(NamedTuple):
    """`Routing` whose shapes do not depend on the data.

    Both modules process all tokens, and one of the two results is selected for each token.

    Attributes:
        mask: (B, S), True at visual tokens.
    """

    mask: torch.Tensor

    def split(self, hidden_states: torch.Tensor) -> ModalitySplit:
        """(B, S, D) for the text module and for the visual module."""
        return hidden_states, hidden_states

    def join(self, parts: ModalitySplit, batch_size: int) -> torch.Tensor:
        """Select from the results of the text and the visual module, (B, S, D) each."""
        return torch.where(self.mask[..., None], parts[VISUAL], parts[TEXT])


AnyRouting = Routing | MaskedRouting


class PermuteRows(torch.autograd.Function):
    """Permute rows. The backward pass applies the inverse permutation.

    The backward pass of `index_select` would accumulate into a tensor of zeros, because PyTorch
    cannot assume that each row is selected once.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class WithoutVisual(torch.autograd.Function):
    """The text tokens. The gradient of the visual module's result is zeros."""

    @staticmethod
    def forward(ctx: Any, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        ctx.visual_shape = visual.shape
        return text.view_as(text)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient.new_zeros(ctx.visual_shape)


class Multiway(nn.ModuleList):
    """Modules for text tokens, ``[TEXT]``, and modules of the same names for visual tokens.

    A module is named ``multiway.0.k_proj`` and ``k_proj.multiway.0`` in released files. Its own
    name comes last, because PEFT and quantization configurations select modules by the end of
    their names: ``target_modules=["k_proj"]`` are the projections of both modalities.

    Args:
        make: By name, create a module that processes each token independently, for example a
            `torch.nn.Linear`.
    """

    def __init__(self, **make: Callable[[], nn.Module]) -> None:
        modalities = ({name: create() for name, create in make.items()} for _ in range(2))
        super().__init__(nn.ModuleDict(modules) for modules in modalities)

    def named_modules(
        self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, ordered by name and then by modality.

        This is the order of parameters in earlier versions. The state of an optimizer is stored by
        position.
        """
        modules = super().named_modules(memo, prefix, remove_duplicate)
        index = len(prefix.split(".")) + 1 if prefix else 1
        return iter(sorted(modules, key=lambda item: item[0].split(".")[index : index + 1]))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *lists: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        lora = {key for key in state_dict if key.startswith(prefix) and ".lora_" in key}
        if lora and not lora <= {prefix + name for name in self.state_dict()}:
            # PEFT would ignore these weights.
            errors = lists[-1]
            errors.append(
                f"the adapter's target_modules do not match the module of {min(lora)}. If they are "
                "released names (k_proj.multiway.0), load the adapter with "
                "Owl2ForConditionalGeneration.from_pretrained and save it again"
            )

    def copy_text_weights(self) -> None:
        """Initialize the visual weights as copies of the text weights (Specification §1.3)."""
        self[VISUAL].load_state_dict(self[TEXT].state_dict())

    def forward(
        self,
        name: str,
        hidden_states: torch.Tensor,
        routing: AnyRouting | None = None,
        parts: ModalitySplit | None = None,
    ) -> torch.Tensor:
        """(B, S, D) to (B, S, D'), each token by the module `name` of its modality.

        Args:
            parts: ``routing.split(hidden_states)``, if it is already computed.
        """
        text, visual = self.pair(name)
        if routing is None:
            return text(hidden_states)
        parts = parts or routing.split(hidden_states)
        return routing.join((text(parts[TEXT]), visual(parts[VISUAL])), hidden_states.shape[0])

    def requires_sequences(self) -> bool:
        """Whether modules must process complete sequences (B, S, D), as PEFT's hooks require."""
        text, visual = self._modules.values()  # faster than `children` and indices
        modules: Any = (*text._modules.values(), *visual._modules.values())
        hooks = [hook for module in modules for hook in module._forward_pre_hooks.values()]
        return any(isinstance(hook, partial) and PER_SEQUENCE & {*hook.keywords} for hook in hooks)

    def pair(self, name: str) -> tuple[Any, Any]:
        """The modules `name` for text and for visual tokens."""
        modalities: Any = self
        return modalities[TEXT][name], modalities[VISUAL][name]


def separate_modalities(
    owner: nn.Module, names: Collection[str], **make: Callable[[], nn.Module]
) -> None:
    """Replace modules of `owner` by ``owner.multiway``, which has them for each modality.

    Args:
        names: `Owl2Config.separate_modules`. Modules that are not among them stay shared, and
            without any, `owner` does not change.
        make: See `Multiway`.
    """
    separate = {name: create for name, create in make.items() if name in names}
    for name in separate:
        delattr(owner, name)
    if separate:
        owner.multiway = Multiway(**separate)


def module_pair(owner: Any, name: str) -> tuple[Any, Any]:
    """The modules `name` of `owner` for text and for visual tokens; the same if it is shared."""
    shared = owner._modules.get(name)
    return (shared, shared) if shared is not None else owner.multiway.pair(name)


def by_modality(
    owner: Any,
    name: str,
    hidden_states: torch.Tensor,
    routing: AnyRouting | None = None,
    parts: ModalitySplit | None = None,
) -> torch.Tensor:
    """As `Multiway.forward`, for a module of `owner` that may be shared by the modalities."""
    shared = owner._modules.get(name)
    if shared is not None:
        result: torch.Tensor = shared(hidden_states)
        return result
    return owner.multiway(name, hidden_states, routing, parts)


def requires_sequences(*owners: Any) -> bool:
    """Whether modules in the `Multiway` of one of the owners must process complete sequences."""
    return any(hasattr(own, "multiway") and own.multiway.requires_sequences() for own in owners)
