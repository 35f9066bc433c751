"""Adapters: LoRA matrices and completely trained parts for a base model.

The base model stays where it is. The adapter's directory has the format of peft:

    adapter_config.json         the Linears with LoRA, the rank, the base model
    adapter_model.safetensors   the LoRA matrices, and the parts in `modules_to_save`
    base.json                   the base's fingerprint: other weights under its name are rejected
    config.json                 of the complete model, with the image size of the training

LoRA replaces the Linears inside the model, whose class does not change. Unlike peft, owl2 trains
the parts in `modules_to_save` in place, without a second copy in memory.

The authors of Q-Align and DeQA-Score publish adapters as `adapter_model.bin` with the LoRA matrices
and `non_lora_trainables.bin` with the parts that were trained completely (Model family §6).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from owl2.checkpoints.config_file import CONFIG_FILE, find_file, read_config, read_json
from owl2.checkpoints.key_report import check_keys
from owl2.checkpoints.weight_files import COMPUTED_KEYS, read_tensors
from owl2.checkpoints.weight_names import module_name, released_name
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_json

# peft takes a second to import, so the functions that use it import it.
if TYPE_CHECKING:
    from peft import LoraConfig

PICKLED_WEIGHTS, PICKLED_PARTS = "adapter_model.bin", "non_lora_trainables.bin"
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
DEFAULT_NAME = "default"  # of an adapter in a model, as in peft
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
        has_config = (self.folder / CONFIG_FILE).is_file()
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
        hint = f"pass base=... (--base on the command line), or edit {self.folder / CONFIG}"
        if not base or (Path(base) / CONFIG).is_file():
            raise InputError(
                f"{self.name} needs the directory or hub id of a complete model as its base model, "
                f"not {base!r}; {hint}",
                ErrorCode.INVALID_CONFIG,
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


def find_adapter(
    name_or_path: str | Path, hub: dict[str, Any], only_lora: bool = True
) -> AdapterFiles | None:
    """The adapter in a directory or on the hub (downloaded); None if there is no adapter.

    Args:
        hub: Location arguments of `from_pretrained` (``subfolder``, ``revision`` ...).

    Raises:
        InputError: Its configuration cannot be read, or is not a LoRA configuration although
            `only_lora` is set.
    """
    try:
        file = find_file(name_or_path, CONFIG, hub)
    except InputError:  # no such directory or hub id; reading config.json reports it
        return None
    if file is None:
        return None
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:  # values of any type raise exceptions of any type
        raise InputError(
            f"{file} is not an adapter configuration: {error!r}", ErrorCode.INVALID_CONFIG
        ) from error
    if isinstance(config, LoraConfig):
        config.target_modules = _with_module_names(config.target_modules)
        config.exclude_modules = _with_module_names(config.exclude_modules)
        config.rank_pattern = {module_name(k): v for k, v in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {module_name(k): v for k, v in (config.alpha_pattern or {}).items()}
    elif only_lora:
        raise InputError(
            f"{file}: only adapters of type LORA are supported, not {config.peft_type}",
            ErrorCode.UNSUPPORTED,
        )
    for name in (WEIGHTS, PICKLED_WEIGHTS, PICKLED_PARTS, BASE, CONFIG_FILE):  # downloads them
        find_file(name_or_path, name, hub)
    if isinstance(config, LoraConfig) and (parts := file.parent / PICKLED_PARTS).is_file():
        names = [name.removeprefix(PREFIX).split(".") for name in read_tensors(parts)]
        saved = {".".join(name[: 2 if name[0] == "model" else 1]) for name in names}
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *saved})
    return AdapterFiles(str(name_or_path), file.parent, config)


def base_name(name_or_path: str | Path, hub: dict[str, Any] | None = None) -> str | None:
    """The base model that an adapter names; None if there is no adapter."""
    file = find_file(name_or_path, CONFIG, hub or {})
    return read_json(file).get("base_model_name_or_path") if file else None


def _with_module_names(targets: Any) -> Any:
    """Target modules by their names in the model, in addition to their released names."""
    if not isinstance(targets, str):
        return targets and {*targets, *map(module_name, targets)}
    is_released = module_name(targets) != targets == released_name(targets)
    return f"{targets}|{module_name(targets)}" if is_released else targets


def add_lora(
    model: PreTrainedModel,
    config: "LoraConfig",
    modules_to_save: Iterable[str] = (),
    name: str = DEFAULT_NAME,
) -> None:
    """Add LoRA to the Linears that `config` names, in place, and freeze all parameters.

    Args:
        modules_to_save: Names of the parts that the adapter stores completely.
        name: Of the adapter in the model, see `adapter_tensors`.
    """
    provenance = getattr(model, "provenance", None)
    if provenance:
        _ = provenance.fingerprint  # read now: the files may change before the adapter is saved
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        from owl2.checkpoints.quantized_lora import QuantizedLoraLinear

        config._register_custom_module({QuantizedLinear: QuantizedLoraLinear})
    model.add_adapter(config, name)
    model.requires_grad_(False)
    # Set afterwards, because peft would add a copy of the parts in `modules_to_save`.
    config.modules_to_save = list(modules_to_save) or None
    config.base_model_name_or_path = provenance.name if provenance else None
    config.revision = provenance.revision if provenance else None


def load_adapter(
    model: PreTrainedModel,
    adapter: AdapterFiles,
    name: str = DEFAULT_NAME,
    parts: Mapping[str, nn.Module] | None = None,
) -> None:
    """Apply an adapter to its base model, in place.

    Args:
        name: Of the adapter in the model, see `adapter_tensors`.
        parts: The modules for the parts that the adapter stores completely, by name. Default:
            those of the model.

    Raises:
        InputError: The adapter does not fit; the message lists missing and unexpected keys.
    """
    config = copy.deepcopy(adapter.config)
    modules = saved_modules(model, adapter)
    config.modules_to_save = None
    try:
        add_lora(model, config, modules, name)
    except ValueError as error:  # peft found no such Linears
        raise InputError(
            f"{adapter.name} does not fit its base model: {error}", ErrorCode.BASE_MODEL_MISMATCH
        ) from error
    state = None
    if parts is not None:
        prefixes = tuple(f"{part}." for part in parts)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}
        for part, module in parts.items():
            state |= {f"{part}.{key}": value for key, value in module.state_dict().items()}
    load_adapter_weights(model, adapter.folder, state, name)


def saved_modules(model: nn.Module, adapter: AdapterFiles) -> list[str]:
    """The names of the modules that an adapter stores completely."""
    # peft matches modules by the end of their names.
    suffixes = tuple(f".{name}" for name in adapter.config.modules_to_save or [])
    return [name for name, _ in model.named_modules() if f".{name}".endswith(suffixes)]


def _check_base(model: PreTrainedModel, folder: Path) -> None:
    """Reject a base model whose weights are not those that the adapter was trained on."""
    file = folder / BASE
    if not file.is_file():  # the adapter was written by another tool
        return
    expected = read_json(file).get("fingerprint")
    provenance = getattr(model, "provenance", None)
    if provenance and provenance.fingerprint not in (expected, None):
        raise InputError(
            f"{folder} was not trained on the weights of {provenance.name}. Pass the "
            f"right base model with base=... (--base), or delete {file} to skip this check",
            ErrorCode.BASE_MODEL_MISMATCH,
        )


def stored_tensors(folder: Path, device: str = "meta") -> tuple[Path, dict[str, torch.Tensor]]:
    """The main file of an adapter's weights, and all its tensors by the released names.

    Args:
        device: See `read_tensors`.

    Raises:
        InputError: There are no weights, or they cannot be read.
    """
    file = folder / WEIGHTS
    files = [file]
    if not file.is_file():
        file = folder / PICKLED_WEIGHTS
        files = [path for path in (file, folder / PICKLED_PARTS) if path.is_file()]
    if not file.is_file():
        raise InputError(
            f"{folder} has neither {WEIGHTS} nor {PICKLED_WEIGHTS}", ErrorCode.MISSING_WEIGHTS
        )
    tensors = (pair for path in files for pair in read_tensors(path, device).items())
    return file, {released_name(key): tensor for key, tensor in tensors}


def load_adapter_weights(
    model: PreTrainedModel,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
    name: str | None = None,
) -> None:
    """Load an adapter's tensors into a model with LoRA.

    Args:
        state, name: See `adapter_tensors`. The tensors of `state` are overwritten.

    Raises:
        InputError: The adapter has another base model or is corrupt, or a key is missing,
            unexpected or of another shape.
    """
    _check_base(model, folder)
    file, stored = stored_tensors(folder, "cpu")
    expected = adapter_tensors(model, state, name)  # share the model's memory
    common = stored.keys() & expected.keys()
    shapes = {key: (stored[key].shape, expected[key].shape) for key in common}
    missing = [key for key in expected.keys() - stored.keys() if not key.endswith(COMPUTED_KEYS)]
    check_keys(file, missing, stored.keys() - expected.keys(), shapes)
    with torch.no_grad():
        for key, tensor in stored.items():
            expected[key].copy_(tensor)


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has LoRA."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_config(model: PreTrainedModel, name: str | None = None) -> "LoraConfig":
    """The configuration of the model's adapter `name`, by default of the only one.

    Raises:
        InputError: The model has several adapters.
    """
    if name is None and len(model.peft_config) != 1:
        raise InputError(
            f"the model has {len(model.peft_config)} adapters; one is supported",
            ErrorCode.UNSUPPORTED,
        )
    name = name or next(iter(model.peft_config))
    config: LoraConfig = model.peft_config[name]  # type: ignore[assignment]  # ours
    return config


def adapter_tensors(
    model: PreTrainedModel, state: dict[str, torch.Tensor] | None = None, name: str | None = None
) -> dict[str, torch.Tensor]:
    """The LoRA matrices and the parts in `modules_to_save`, by the released names.

    Args:
        state: Instead of the model's state dict.
        name: Of the adapter in the model. Default: the only one.
    """
    from peft import get_peft_model_state_dict

    saved = tuple(f"{part}." for part in adapter_config(model, name).modules_to_save or [])
    state = model.state_dict() if state is None else state
    name = name or next(iter(model.peft_config))
    # Without embeddings, which are never adapted: peft would search the hub for the base model.
    lora = get_peft_model_state_dict(model, state, name, save_embedding_layers=False)
    tensors = lora | {key: tensor for key, tensor in state.items() if key.startswith(saved)}
    return {PREFIX + released_name(key): tensor for key, tensor in tensors.items()}


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
        atomic_write_json(folder / BASE, {"fingerprint": provenance.fingerprint})


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
    load_adapter_weights(model, adapter.folder)
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
