"""LoRA adapters beside one base model: each prompt names the adapter that computes it.

::

    tokens of all prompts ──weights of the base model──► outputs of all tokens
    tokens of one adapter ──its low-rank matrices──────► added to the outputs of these tokens

PEFT's layers have the matrices of all adapters, and none is active outside of `LoraManager.use`.
The CPU kernels and PEFT mix adapters in a batch. Images are encoded, and scores are computed, for
one adapter after the other. An adapter that contains the complete vision encoder or abstractor has
its own copy of it.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from owl2.checkpoints.adapters import (
    AdapterFiles,
    find_adapter,
    has_adapter,
    load_adapter,
    lora_layers,
    saved_modules,
)
from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.model.modeling import Owl2ForConditionalGeneration

if TYPE_CHECKING:
    from pathlib import Path

VISUAL_PARTS = ("model.vision_model", "model.visual_abstractor")
LAYERS = "model.layers."
BASE = "__base__"  # PEFT's name for rows without an adapter
# Options of PEFT that change more than the outputs of Linears, or do not support mixed batches.
UNSUPPORTED_OPTIONS = (
    *("use_dora", "alora_invocation_tokens", "arrow_config", "use_qalora", "layer_replication"),
    *("trainable_token_indices", "target_parameters"),
)


class AdapterTokens(NamedTuple):
    """The tokens of an adapter.

    Attributes:
        name: Of the adapter in PEFT's layers.
        text, visual, all: Indices of its tokens by modality, and of all.
    """

    name: str
    text: torch.Tensor
    visual: torch.Tensor
    all: torch.Tensor


class LoraManager:
    """The adapters of a model. Their matrices are added to the model in place.

    Contexts of `use` and `use_rows` are for the thread that runs the model.

    Args:
        model: Without an adapter.
        adapters: By the names that prompts use; default: none.

    Raises:
        InputError: An adapter does not fit the model, or has parts that cannot be served beside
            the base model.

    Attributes:
        names: Of the adapters.
    """

    def __init__(
        self,
        model: Owl2ForConditionalGeneration,
        adapters: Mapping[str, AdapterFiles] | None = None,
    ) -> None:
        self.names = tuple(adapters or ())
        self._model = model
        # PEFT selects by substring, so that no name may contain another.
        self._keys = {name: f"adapter_{index:05d}" for index, name in enumerate(self.names)}
        self._parts: dict[str, dict[str, nn.Module]] = {}
        self._layers: dict[str, Any] = {}
        self._active: str | None = None
        self._active_keys: list[str] = []  # all layers have this list
        self._originals: dict[str, nn.Module] = {}
        if not adapters:
            return
        if has_adapter(model):
            raise InputError(
                "A model with an adapter cannot serve others. Merge it with `owl2 merge`, and use "
                "the result as the base model.",
                ErrorCode.CONFLICT,
            )
        for name, files in adapters.items():  # copies of parts, before they get LoRA
            _check(model, name, files)
            parts = saved_modules(model, files)
            self._parts[name] = {part: copy.deepcopy(model.get_submodule(part)) for part in parts}
        for part in {part for parts in self._parts.values() for part in parts}:
            self._originals[part] = model.get_submodule(part)
        for name, files in adapters.items():
            with error_prefix(f"Adapter {name}: "), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                load_adapter(model, files, self._keys[name], self._parts[name])
            _check_layers(model, name, files, self._keys[name])
        self._layers = dict(lora_layers(model))
        for layer in self._layers.values():
            layer.set_adapter(self._active_keys, inference_mode=True)
        model.eval()

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Within the context, the model's own forward computes with one adapter; None: without."""
        previous = self._active
        if name == previous:
            yield
            return
        self._set_active(name)
        try:
            yield
        finally:
            self._set_active(previous)

    @contextmanager
    def use_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the context, the decoder computes row i of a batch with adapter `names[i]`."""
        if len(set(names)) == 1:
            with self.use(names[0]):
                yield
            return
        keys = [BASE if name is None else self._keys[name] for name in names]
        hook = partial(_pass_adapter_names, adapter_names=keys)
        handles = [
            layer.register_forward_pre_hook(hook, with_kwargs=True)
            for name, layer in self._layers.items()
            if name.startswith(LAYERS)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tokens(
        self,
        names: Sequence[str | None],
        lengths: Sequence[int],
        order: torch.Tensor | None,
        num_text: int,
    ) -> list[AdapterTokens] | None:
        """The tokens of each adapter in a sequence that consists of those of several prompts.

        Args:
            names: The adapters of B prompts.
            lengths: Their numbers of tokens.
            order: (M,) indices of the tokens in the order of the sequence; None: unchanged.
            num_text: The number of text tokens, the first ones.

        Returns:
            None if the model has no adapters.
        """
        if not self.names:
            return None
        used = [name for name in self.names if name in names]
        if not used:
            return []
        indices = torch.tensor([-1 if name is None else used.index(name) for name in names])
        indices = indices.repeat_interleave(torch.tensor(lengths))  # (M,)
        if order is not None:
            indices = indices[order]
        tokens = []
        for index, name in enumerate(used):
            own = (indices == index).nonzero()[:, 0]
            is_text = own < num_text
            tokens.append(AdapterTokens(self._keys[name], own[is_text], own[~is_text], own))
        return tokens

    def _set_active(self, name: str | None) -> None:
        self._active = name
        self._active_keys[:] = [] if name is None else [self._keys[name]]
        own = {} if name is None else self._parts[name]
        for part, original in self._originals.items():
            self._model.set_submodule(part, own.get(part, original))


def find_adapters(paths: "Mapping[str, str | Path]") -> dict[str, AdapterFiles]:
    """The adapters in directories or on the hub, by their names.

    Raises:
        InputError: A directory or hub id has no adapter, or its configuration is invalid.
    """
    found: dict[str, AdapterFiles] = {}
    for name, path in paths.items():
        with error_prefix(f"Adapter {name}: "):
            adapter = find_adapter(path, {})
            if adapter is None:
                raise InputError(
                    f"{path} is not an adapter: it has no adapter_config.json.",
                    ErrorCode.FILE_NOT_FOUND,
                )
        found[name] = adapter
    return found


def _check(model: Owl2ForConditionalGeneration, name: str, files: AdapterFiles) -> None:
    """Raise an InputError for an adapter that is more than LoRA and visual parts."""
    options = [name for name in UNSUPPORTED_OPTIONS if getattr(files.config, name, None)]
    if files.config.bias != "none":
        options.append("bias")
    if options:
        raise _not_served(name, files, ", ".join(options))
    if others := [part for part in saved_modules(model, files) if part not in VISUAL_PARTS]:
        raise _not_served(name, files, f"complete weights of {', '.join(others)}")
    if files.image_size not in (None, model.config.image_size):
        raise _not_served(name, files, f"images of {files.image_size} pixels")


def _check_layers(
    model: Owl2ForConditionalGeneration, name: str, files: AdapterFiles, key: str
) -> None:
    """Raise an InputError for LoRA on modules that are neither Linears nor in the visual parts."""
    visual = tuple(f"{part}." for part in VISUAL_PARTS)
    for module, layer in lora_layers(model):
        is_linear = module.startswith(LAYERS) and key in layer.lora_A
        is_used = key in layer.lora_A or key in layer.lora_embedding_A
        if is_used and not (is_linear or module.startswith(visual)):
            raise _not_served(name, files, f"LoRA on {module}")
        if key in layer.lora_variant:
            raise _not_served(name, files, "a variant of LoRA")


def _not_served(name: str, files: AdapterFiles, reason: str) -> InputError:
    return InputError(
        f"Adapter {name} ({files.name}) has {reason}, which cannot be served beside the base "
        f"model. Merge it: owl2 merge {files.name} --output DIR, and serve DIR.",
        ErrorCode.UNSUPPORTED,
    )


def _pass_adapter_names(
    layer: nn.Module, args: Any, kwargs: dict[str, Any], *, adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    """A hook that passes the adapter of each row to a layer of PEFT."""
    return args, kwargs | {"adapter_names": adapter_names}
