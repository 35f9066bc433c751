"""Adapters: a model that is a base model, LoRA matrices beside it, and parts trained as a whole.

The base stays where it is; a directory holds the difference, in peft's form:

    adapter_config.json         which Linears have LoRA, at which rank; where the base is
    adapter_model.safetensors   the LoRA matrices, and all of the parts in `modules_to_save`
    base.json                   the base's fingerprint: other weights under its name are refused
    config.json                 the whole model's, with the image size that was trained at

LoRA is put in place of the Linears inside the model, whose class stays what it is. Unlike peft, we
train the parts in `modules_to_save` where they stand, without a second copy of them in memory.
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
from owl2.checkpoints.key_report import key_problems
from owl2.checkpoints.provenance import COMPUTED, IF_THERE, Provenance
from owl2.checkpoints.weight_files import check_weight_file
from owl2.errors import InputError

# peft takes a second to import, so those who need it do so when they run.
if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."  # of all names in peft's files: its wrappers around a model


@dataclass(frozen=True)
class AdapterFiles:
    """A directory with an adapter; `name` is what it was asked for by."""

    name: str
    folder: Path
    config: "LoraConfig"

    @property
    def image_size(self) -> int | None:
        """The images that it was trained with (pixels); None if it does not say."""
        has_config = (self.folder / "config.json").is_file()
        return read_config(self.folder).image_size if has_config else None

    def base(self, instead: str | Path | None, hub: dict[str, Any]) -> tuple[str, str | None]:
        """The base model's place and, on the hub, its revision.

        Raises:
            InputError: there is no model there; says how to give another place.
        """
        place = str(instead or self.config.base_model_name_or_path or "")
        revision = None if instead else self.config.revision
        how = f"give its place with base=..., or write it into {self.folder / CONFIG}"
        if not place:
            raise InputError(f"{self.name} is an adapter, and names no base model: {how}")
        if is_adapter(place):
            raise InputError(f"{place}, the base of {self.name}, is an adapter itself: {how}")
        try:
            read_config(place, revision=revision, **hub)
        except InputError as error:
            raise InputError(
                f"{self.name} is an adapter for the model {place}, which is not there or cannot "
                f"be read ({error}): {how}",
                error.code,
            ) from error
        return place, revision


def find_adapter(name_or_path: str | Path, hub: dict[str, Any]) -> AdapterFiles | None:
    """The adapter in a directory or on the hub (fetched); None if there is none.

    Args:
        hub: where to look, as transformers' `from_pretrained` (``subfolder``, ``revision`` ...).

    Raises:
        InputError: its configuration cannot be read, or is of another kind than LoRA.
    """
    try:
        file = find_adapter_config_file(str(name_or_path), **hub)
    except OSError:  # no name that the hub could know: what reads config.json next says so
        return None
    if file is None:
        return None
    from peft import LoraConfig, PeftConfig

    folder = Path(file).parent
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # values of any type: what trips over them raises anything
        raise InputError(f"{file} is no adapter's configuration: {error!r}") from error
    if not isinstance(config, LoraConfig):
        raise InputError(f"{file}: owl2 reads adapters of the kind LORA, not {config.peft_type}")
    if not Path(name_or_path).is_dir():
        for wanted in (WEIGHTS, BASE, "config.json"):
            cached_file(str(name_or_path), wanted, **IF_THERE, **hub)
    return AdapterFiles(str(name_or_path), folder, config)


def is_adapter(path: str | Path) -> bool:
    """Whether a local directory holds an adapter instead of a whole model."""
    return (Path(path) / CONFIG).is_file()


def add_lora(model: PreTrainedModel, config: "LoraConfig", whole: Iterable[str] = ()) -> None:
    """Put LoRA beside the Linears that `config` names, in place; all parameters are then frozen.

    Args:
        whole: names of the parts that the adapter holds as a whole.
    """
    if source := _source_of(model):
        _ = source.fingerprint  # now: who saves hours later may find other files there
    model.add_adapter(config)
    model.requires_grad_(False)
    # peft would wrap the parts in `modules_to_save` beside a copy, so it hears of them afterwards.
    config.modules_to_save = list(whole) or None
    config.base_model_name_or_path = source.name if source else None
    config.revision = source.revision if source else None


def load_adapter(model: PreTrainedModel, adapter: AdapterFiles) -> None:
    """Make of a base model the one that was trained: LoRA in place, and everything read.

    Raises:
        InputError: the adapter does not fit, names what is missing or too much.
    """
    check_base(model, adapter.folder)
    config = copy.deepcopy(adapter.config)
    whole, config.modules_to_save = config.modules_to_save or [], None
    try:
        add_lora(model, config, _modules_named(model, whole))
    except ValueError as error:  # peft: no such Linears
        raise InputError(f"{adapter.name} does not fit its base model: {error}") from error
    _load_numbers(model, adapter.folder)


def check_base(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model with other weights than those that an adapter was trained on.

    Args:
        folder: the adapter's directory.

    Raises:
        InputError: says which, and what to do.
    """
    file = folder / BASE
    if not file.is_file():  # made by another tool
        return
    try:
        expected = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged: {error!r}") from error
    source = _source_of(model)
    if source and source.fingerprint not in (expected, None):
        raise InputError(
            f"{source.name} is not the model that {folder} was trained on: its weights are others. "
            f"Give the right one with base=...; without {file} whatever fits is taken"
        )


def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Go on from an adapter's directory: its numbers, in the places that `add_lora` made.

    Raises:
        InputError: it was trained on another base, is broken, or a key is missing, unexpected or of
            another shape.
    """
    check_base(model, folder)
    _load_numbers(model, folder)


def _load_numbers(model: PreTrainedModel, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(f"{folder} holds an adapter without its weights, {WEIGHTS}")
    check_weight_file(file)
    stored = load_file(file)
    expected = adapter_tensors(model)
    shapes = {
        key: (tuple(stored[key].shape), tuple(expected[key].shape))
        for key in stored.keys() & expected.keys()
        if stored[key].shape != expected[key].shape
    }
    missing = {key for key in expected.keys() - stored.keys() if not key.endswith(COMPUTED)}
    problems = key_problems(missing, stored.keys() - expected.keys(), shapes)
    if problems:
        raise InputError(f"{file} does not fit {CONFIG} and the base model. Keys\n{problems}")
    own = model.state_dict()  # shares the model's memory
    whole = {key: key.removeprefix(PREFIX) for key in stored if _is_whole(model, key)}
    with torch.no_grad():
        for key, name in whole.items():
            own[name].copy_(stored.pop(key))
    lora = {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}
    set_peft_model_state_dict(model, lora)


def has_adapter(model: nn.Module) -> bool:
    """Whether there is LoRA in the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_config(model: PreTrainedModel) -> "LoraConfig":
    """The one adapter's configuration.

    Raises:
        InputError: there are several.
    """
    if len(model.peft_config) != 1:
        raise InputError(f"the model has {len(model.peft_config)} adapters; owl2 handles one")
    config: LoraConfig = next(iter(model.peft_config.values()))  # type: ignore[assignment]  # ours
    return config


def adapter_tensors(
    model: PreTrainedModel, state: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """LoRA's matrices and the parts kept whole, under the names that peft's files have.

    Args:
        state: the model's state, if it is gathered from elsewhere.
    """
    from peft import get_peft_model_state_dict

    adapter_config(model)
    state = model.state_dict() if state is None else state
    name = next(iter(model.peft_config))
    # Embeddings are never adapted; asking would make peft look for the base on the hub.
    lora = get_peft_model_state_dict(model, state, name, save_embedding_layers=False)
    tensors = {PREFIX + key: tensor for key, tensor in lora.items()}
    return tensors | {PREFIX + k: v for k, v in state.items() if _is_whole(model, PREFIX + k)}


def save_adapter(
    model: PreTrainedModel, directory: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter's directory; the base model is only named in it.

    Args:
        state: the model's state, if it is gathered from elsewhere.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_tensors(model, state).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    adapter = copy.deepcopy(adapter_config(model))
    adapter.inference_mode = True  # who loads it to go on training says so
    adapter.save_pretrained(str(folder))
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # of this run's copy of the base, not of the base
        del config.quantization_config
    config.save_pretrained(folder)
    source = _source_of(model)
    if source and source.fingerprint:
        text = json.dumps({"fingerprint": source.fingerprint}, indent=2) + "\n"
        (folder / BASE).write_text(text, encoding="utf-8")


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: AdapterFiles) -> None:
    """Add LoRA's products to the weights beside them, in place: then it is a plain model.

    Computed in float32 and rounded once, to the weights' own dtype. `adapter` is what the model
    was loaded with: read again, as LoRA's matrices may have been rounded.
    """
    layers = list(lora_layers(model))
    for _, layer in layers:
        for parameter in lora_parameters(layer):
            parameter.data = parameter.data.float()
    _load_numbers(model, adapter.folder)
    for name, layer in layers:
        linear = layer.get_base_layer()
        dtype = linear.weight.dtype
        linear.float()
        layer.merge(safe_merge=True)
        model.set_submodule(name, linear.to(dtype))
    del model.peft_config
    model._hf_peft_config_loaded = False


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The Linears with LoRA beside them, by name."""
    from peft.tuners.lora import LoraLayer

    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """LoRA's own parameters."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def _source_of(model: PreTrainedModel) -> Provenance | None:
    source: Provenance | None = getattr(model, "provenance", None)  # of ours, see `checkpoint`
    return source


def _modules_named(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Full names of the modules that peft means: those whose names end so."""
    wanted = tuple(f".{name}" for name in names)
    return [name for name, _ in model.named_modules() if f".{name}".endswith(wanted)]


def _is_whole(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor of a file is of a part that the adapter holds as a whole."""
    parts = adapter_config(model).modules_to_save or []
    return key.startswith(tuple(f"{PREFIX}{part}." for part in parts))
