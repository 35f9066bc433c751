"""Adapters: LoRA matrices and completely trained parts for a base model.

The base model stays where it is. The adapter's directory has the format of peft:

    adapter_config.json         the Linears with LoRA, the rank, the base model
    adapter_model.safetensors   the LoRA matrices, and the parts in `modules_to_save`
    base.json                   the base's fingerprint: other weights under its name are rejected
    config.json                 of the complete model, with the image size of the training

LoRA replaces the Linears inside the model, whose class does not change. Unlike peft, owl2 trains
the parts in `modules_to_save` in place, without a second copy in memory.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.key_report import check_keys
from owl2.checkpoints.provenance import COMPUTED_KEYS
from owl2.checkpoints.weight_files import OPTIONAL_FILE, read_header
from owl2.errors import ErrorCode, InputError

# peft takes a second to import, so the functions that use it import it.
if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."  # of all names in peft's files: its wrappers around a model


@dataclass(frozen=True)
class AdapterFiles:
    """A directory with an adapter; `name` is the directory or hub id that was requested."""

    name: str
    folder: Path
    config: "LoraConfig"

    @property
    def image_size(self) -> int | None:
        """The image size of the training in pixels; None if unknown."""
        has_config = (self.folder / "config.json").is_file()
        return read_config(self.folder).image_size if has_config else None

    def base(self, override: str | Path | None, hub: dict[str, Any]) -> tuple[str, str | None]:
        """The base model's directory or hub id, and its revision on the hub.

        Args:
            override: A base model to use instead of the one in the adapter's configuration.

        Raises:
            InputError: The base model is missing or cannot be read.
        """
        base = str(override or self.config.base_model_name_or_path or "")
        revision = None if override else self.config.revision
        hint = f"pass base=..., or edit {self.folder / CONFIG}"
        if not base or is_adapter(base):
            problem = f"{base} is an adapter itself" if base else "the adapter does not name it"
            raise InputError(
                f"{self.name} has no base model: {problem}; {hint}", ErrorCode.INVALID_CONFIG
            )
        try:
            read_config(base, revision=revision, **hub)
        except InputError as error:
            raise InputError(
                f"{self.name} is an adapter for the model {base}, which cannot be read ({error}); "
                f"{hint}",
                error.code,
            ) from error
        return base, revision


def find_adapter(name_or_path: str | Path, hub: dict[str, Any]) -> AdapterFiles | None:
    """The adapter in a directory or on the hub (downloaded); None if there is no adapter.

    Args:
        hub: Location arguments of `from_pretrained` (``subfolder``, ``revision`` ...).

    Raises:
        InputError: Its configuration cannot be read, or is not a LoRA configuration.
    """
    try:
        file = find_adapter_config_file(str(name_or_path), **hub)
    except OSError:  # not a valid hub id; reading config.json reports it
        return None
    if file is None:
        return None
    from peft import LoraConfig, PeftConfig

    folder = Path(file).parent
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # values of any type raise exceptions of any type
        raise InputError(
            f"{file} is not an adapter configuration: {error!r}", ErrorCode.INVALID_CONFIG
        ) from error
    if not isinstance(config, LoraConfig):
        raise InputError(
            f"{file}: only adapters of type LORA are supported, not {config.peft_type}",
            ErrorCode.UNSUPPORTED,
        )
    if not Path(name_or_path).is_dir():
        for name in (WEIGHTS, BASE, "config.json"):
            cached_file(str(name_or_path), name, **OPTIONAL_FILE, **hub)
    return AdapterFiles(str(name_or_path), folder, config)


def is_adapter(path: str | Path) -> bool:
    """Whether a local directory contains an adapter instead of a complete model."""
    return (Path(path) / CONFIG).is_file()


def add_lora(
    model: PreTrainedModel, config: "LoraConfig", modules_to_save: Iterable[str] = ()
) -> None:
    """Add LoRA to the Linears that `config` names, in place, and freeze all parameters.

    Args:
        modules_to_save: Names of the parts that the adapter stores completely.
    """
    provenance = getattr(model, "provenance", None)
    if provenance:
        _ = provenance.fingerprint  # read now: the files may change before the adapter is saved
    model.add_adapter(config)
    model.requires_grad_(False)
    # Set afterwards, because peft would add a copy of the parts in `modules_to_save`.
    config.modules_to_save = list(modules_to_save) or None
    config.base_model_name_or_path = provenance.name if provenance else None
    config.revision = provenance.revision if provenance else None


def load_adapter(model: PreTrainedModel, adapter: AdapterFiles) -> None:
    """Apply an adapter to its base model, in place.

    Raises:
        InputError: The adapter does not fit; the message lists missing and unexpected keys.
    """
    check_base(model, adapter.folder)
    config = copy.deepcopy(adapter.config)
    # peft matches modules by the end of their names.
    suffixes = tuple(f".{name}" for name in config.modules_to_save or [])
    modules = [name for name, _ in model.named_modules() if f".{name}".endswith(suffixes)]
    config.modules_to_save = None
    try:
        add_lora(model, config, modules)
    except ValueError as error:  # peft found no such Linears
        raise InputError(
            f"{adapter.name} does not fit its base model: {error}", ErrorCode.BASE_MODEL_MISMATCH
        ) from error
    _load_tensors(model, adapter.folder)


def check_base(model: PreTrainedModel, folder: Path) -> None:
    """Reject a base model with other weights than the ones that an adapter was trained on.

    Args:
        folder: The adapter's directory.

    Raises:
        InputError: The fingerprints differ, or ``base.json`` is corrupt.
    """
    file = folder / BASE
    if not file.is_file():  # the adapter was written by another tool
        return
    try:
        expected = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is corrupt: {error!r}", ErrorCode.UNREADABLE_FILE) from error
    provenance = getattr(model, "provenance", None)
    if provenance and provenance.fingerprint not in (expected, None):
        raise InputError(
            f"{folder} was trained on other weights than those of {provenance.name}. Pass the "
            f"right base model with base=..., or delete {file} to skip this check",
            ErrorCode.BASE_MODEL_MISMATCH,
        )


def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load an adapter's tensors into a model with LoRA, to resume training.

    Raises:
        InputError: The adapter has another base model or is corrupt, or a key is missing,
            unexpected or of another shape.
    """
    check_base(model, folder)
    _load_tensors(model, folder)


def _load_tensors(model: PreTrainedModel, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}", ErrorCode.MISSING_WEIGHTS)
    read_header(file)
    stored = load_file(file)
    expected = adapter_tensors(model)
    shapes = {
        key: (tuple(stored[key].shape), tuple(expected[key].shape))
        for key in stored.keys() & expected.keys()
        if stored[key].shape != expected[key].shape
    }
    missing = [key for key in expected.keys() - stored.keys() if not key.endswith(COMPUTED_KEYS)]
    check_keys(file, missing, stored.keys() - expected.keys(), shapes)
    own = model.state_dict()  # shares the model's memory
    with torch.no_grad():
        for key in [key for key in stored if _is_saved_module(model, key)]:
            own[key.removeprefix(PREFIX)].copy_(stored.pop(key))
    lora = {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}
    set_peft_model_state_dict(model, lora)


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has LoRA."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_config(model: PreTrainedModel) -> "LoraConfig":
    """The configuration of the model's adapter.

    Raises:
        InputError: The model has several adapters.
    """
    if len(model.peft_config) != 1:
        raise InputError(
            f"the model has {len(model.peft_config)} adapters; one is supported",
            ErrorCode.UNSUPPORTED,
        )
    config: LoraConfig = next(iter(model.peft_config.values()))  # type: ignore[assignment]  # ours
    return config


def adapter_tensors(
    model: PreTrainedModel, state: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The LoRA matrices and the parts in `modules_to_save`, by the names in peft's files.

    Args:
        state: The model's state dict, if it is gathered from several processes.
    """
    from peft import get_peft_model_state_dict

    adapter_config(model)
    state = model.state_dict() if state is None else state
    name = next(iter(model.peft_config))
    # Without embeddings, which are never adapted: peft would search the hub for the base model.
    lora = get_peft_model_state_dict(model, state, name, save_embedding_layers=False)
    tensors = {PREFIX + key: tensor for key, tensor in lora.items()}
    return tensors | {
        PREFIX + k: v for k, v in state.items() if _is_saved_module(model, PREFIX + k)
    }


def save_adapter(
    model: PreTrainedModel, directory: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter's directory, with a reference to the base model.

    Args:
        state: The model's state dict, if it is gathered from several processes.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_tensors(model, state).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    adapter = copy.deepcopy(adapter_config(model))
    adapter.inference_mode = True  # training sets it to False
    adapter.save_pretrained(str(folder))
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # of this run's copy of the base model
        del config.quantization_config
    config.save_pretrained(folder)
    provenance = getattr(model, "provenance", None)
    if provenance and provenance.fingerprint:
        text = json.dumps({"fingerprint": provenance.fingerprint}, indent=2) + "\n"
        (folder / BASE).write_text(text, encoding="utf-8")


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: AdapterFiles) -> None:
    """Merge LoRA into the weights, in place; the result is a model without an adapter.

    The products are computed in float32 and rounded once, to the dtype of the weights.

    Args:
        adapter: The adapter that the model was loaded with. It is read again, because the LoRA
            matrices in memory may have been rounded.
    """
    layers = list(lora_layers(model))
    for _, layer in layers:
        for parameter in lora_parameters(layer):
            parameter.data = parameter.data.float()
    _load_tensors(model, adapter.folder)
    for name, layer in layers:
        linear = layer.get_base_layer()
        dtype = linear.weight.dtype
        linear.float()
        layer.merge(safe_merge=True)
        model.set_submodule(name, linear.to(dtype))
    del model.peft_config
    model._hf_peft_config_loaded = False


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The Linears with LoRA, by name."""
    from peft.tuners.lora import LoraLayer

    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of LoRA."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def _is_saved_module(model: PreTrainedModel, key: str) -> bool:
    """Whether a key of peft's file belongs to a part in `modules_to_save`."""
    parts = adapter_config(model).modules_to_save or []
    return key.startswith(tuple(f"{PREFIX}{part}." for part in parts))
