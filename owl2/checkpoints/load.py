"""Reading and refusing checkpoints in the released layout (SPEC 1.4).

Module names equal the released keys, so transformers' own loader does the work. What is added: a
key is loaded, recomputed (position codes, ``inv_freq``) or refused with a list; nothing is
initialised silently. Positions learned at another resolution are resized.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from owl2.checkpoints.adapters import (
    AdapterFiles,
    find_adapter,
    has_adapter,
    load_adapter,
    save_adapter,
)
from owl2.checkpoints.config_file import check_generation_config, read_config
from owl2.checkpoints.key_report import Shapes, key_problems, listing
from owl2.checkpoints.provenance import Provenance
from owl2.checkpoints.weight_files import check_weight_files
from owl2.errors import InputError

POSITIONS = "model.vision_model.embeddings.position_embedding"
# Options that say where a checkpoint is.
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Old config.json files spell out every default of the transformers that wrote them. This one would
# cap answers, or warn beside every max_new_tokens.
UNSET_MAX_LENGTH = 20
# The last: a setting in config.json of a wrong type.
UNREADABLE = (OSError, SafetensorError, EOFError, StrictDataclassError)
# transformers says which keys did not fit, and we decide.
ACCOUNT_FOR_KEYS: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}


class CheckpointMixin(PreTrainedModel):
    """`from_pretrained` that accounts for every key, and remembers the place."""

    provenance: Provenance | None = None

    # Computed, not learned: made anew where a checkpoint does not carry them.
    _keys_to_ignore_on_load_missing = [r"attention\.[qk]_pos_embed$"]
    # Old LLaMA checkpoints carry these; they are computed from the configuration.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a narrower, documented signature
        cls,
        name_or_path: str | Path,
        *args: Any,
        image_size: int | None = None,
        base: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint in the released layout, or an adapter and its base model.

        Args:
            name_or_path: a directory or a hub id. Holds ``config.json`` and ``pytorch_model*.bin``
                or ``*.safetensors``, in shards with an index or whole; pickles are read with
                ``weights_only=True``. Or it holds an adapter (`owl2.checkpoints.adapters`).
            base: for an adapter: where its base model is, instead of the place that it names.
            image_size: take images of this size (pixels); positions are resized bicubically.
            kwargs: as transformers' ``from_pretrained`` (``dtype``, ``attn_implementation``,
                ``device_map``, ``quantization_config`` ...).

        Raises:
            InputError: if this is no checkpoint of mPLUG-Owl2, if a key is missing, unexpected or
                of another shape (the message lists them), or an adapter's base is not there.
        """
        # transformers' Auto classes say so when they have seen an adapter themselves.
        asked = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path", name_or_path)
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        if adapter := find_adapter(asked, hub):
            return cls._adapted(adapter, base, image_size, *args, **kwargs)
        if base is not None:
            raise InputError(f"base=... is for adapters, and {name_or_path} is a whole model")
        want_info = kwargs.pop("output_loading_info", False)
        _check_files(name_or_path, kwargs)
        model, info = cls._load(name_or_path, *args, **kwargs)
        mismatched = {key: (tuple(a), tuple(b)) for key, a, b in info["mismatched_keys"]}
        if POSITIONS in mismatched and "quantization_config" not in kwargs:
            # The configuration asks for another resolution than the weights were trained at:
            # load at theirs, then resize.
            image_size = image_size or model.config.image_size
            stored = _image_size_of(mismatched[POSITIONS][0], model.config)
            if stored is not None:
                config = model.config
                config.visual_config.visual_model.image_size = stored
                grid = stored // config.visual_config.visual_model.patch_size
                config.visual_config.visual_abstractor.grid_size = grid
                kwargs.pop("config", None)
                model, info = cls._load(name_or_path, *args, config=config, **kwargs)
                mismatched = {k: (tuple(a), tuple(b)) for k, a, b in info["mismatched_keys"]}
        _refuse(name_or_path, info["missing_keys"], info["unexpected_keys"], mismatched)
        if model.can_generate() and model.generation_config.max_length == UNSET_MAX_LENGTH:
            model.generation_config.max_length = None
        if image_size is not None:
            model.set_image_size(image_size)
        model.provenance = Provenance.of(name_or_path, hub)
        return (model, info) if want_info else model

    @classmethod
    def _adapted(
        cls,
        adapter: AdapterFiles,
        base: str | Path | None,
        image_size: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The base model with the adapter in it; nothing of it is to be trained."""
        for name in ("adapter_kwargs", "revision", "subfolder"):  # the adapter's, not its base's
            kwargs.pop(name, None)
        want_info = kwargs.pop("output_loading_info", False)
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        place, revision = adapter.base(base, hub)
        if config := kwargs.get("config"):
            # From an Auto class: the adapter's own, whose image size comes after the base.
            grid = read_config(place, revision=revision, **hub).visual_config
            config.visual_config.visual_model.image_size = grid.visual_model.image_size
            config.visual_config.visual_abstractor.grid_size = grid.visual_model.grid_size
        if revision is not None:
            kwargs["revision"] = revision
        model, info = cls.from_pretrained(place, *args, output_loading_info=True, **kwargs)
        if adapter.image_size is not None:
            model.set_image_size(adapter.image_size)
        load_adapter(model, adapter)
        if image_size is not None:
            model.set_image_size(image_size)
        return (model.eval(), info) if want_info else model.eval()

    def save_pretrained(  # type: ignore[override]  # the rest as transformers' has it
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers' own; of a model with an adapter, an adapter's directory is written.

        transformers would leave out the parts that were trained as a whole beside it.
        """
        if not has_adapter(self):
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        elif is_main_process:
            save_adapter(self, save_directory, state_dict)

    @classmethod
    def from_parts(
        cls, config: Any, weights: dict[str, Any], dtype: Any, fresh: tuple[str, ...]
    ) -> Any:
        """A model of `weights`; only parameters whose names start with `fresh` may be missing.

        Those are initialised; tensors in `weights` are taken over without a copy.
        """
        model, info = cls._load(None, config=config, state_dict=weights, dtype=dtype)
        missing = {key for key in info["missing_keys"] if not key.startswith(fresh)}
        mismatched = {key: (tuple(a), tuple(b)) for key, a, b in info["mismatched_keys"]}
        _refuse("the given weights", missing, info["unexpected_keys"], mismatched)
        return model

    @classmethod
    def _load(cls, name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        with reading(name_or_path):
            loaded: Any = super().from_pretrained(
                name_or_path, *args, **(kwargs | ACCOUNT_FOR_KEYS)
            )
        return loaded


@contextmanager
def reading(source: str | Path | None) -> Iterator[None]:
    """What goes wrong while weights are read is an InputError.

    transformers' own report is not shown: it says "newly initialized" where we refuse.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's own words advise to switch its safety off
        raise InputError(f"{source}: a weight file is broken, or holds code") from error
    except UNREADABLE as error:
        raise InputError(f"{source} cannot be loaded as a checkpoint: {error}") from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):  # what torch says of a broken .bin
            raise
        raise InputError(f"{source}: a weight file is broken: {error}") from error
    finally:
        logging.set_verbosity(before)


def refuse_gaps(source: str | Path, info: dict[str, Any]) -> None:
    """Raise if transformers had to make up weights of a model which is not ours."""
    shapes = [
        f"{key}: {tuple(a)} in the file, {tuple(b)} in the model"
        for key, a, b in info["mismatched_keys"]
    ]
    gaps = sorted(info["missing_keys"]) + sorted(shapes)
    if gaps:
        raise InputError(f"{source} lacks weights\n" + listing("missing or of another shape", gaps))


def _check_files(name_or_path: str | Path, options: dict[str, Any]) -> None:
    """The configuration, and the files of a local directory, before any weight is read."""
    config = options.get("config")
    if config is None:
        config = read_config(
            name_or_path, **{name: options[name] for name in HUB if name in options}
        )
    folder = Path(name_or_path) / (options.get("subfolder") or "")
    if not folder.is_dir():
        return
    check_generation_config(folder)
    whole = check_weight_files(folder, options.get("use_safetensors") is not False)
    if whole and getattr(config, "quantization_config", None) is None:
        raise InputError(
            f"{folder}: weights must be floating-point numbers, not whole ones\n"
            + listing("these are not", whole)
        )


def _image_size_of(shape: tuple[int, ...], config: Any) -> int | None:
    """The image size whose position embedding has this shape (1, 1 + n², D), if there is one."""
    if len(shape) != 3:
        return None
    grid = round((shape[1] - 1) ** 0.5)
    if grid < 1 or shape[1] != 1 + grid**2:
        return None
    return grid * config.visual_config.visual_model.patch_size


def _refuse(
    name_or_path: str | Path,
    missing: set[str],
    unexpected: set[str],
    mismatched: Shapes,
) -> None:
    """Raise if anything in the checkpoint is not accounted for."""
    problems = key_problems(missing, unexpected, mismatched)
    if not problems:
        return
    hint = ""
    if any(key.endswith("self_attn.k_proj.weight") for key in unexpected):
        hint = "\nThis looks like a plain LLaMA; `owl2 init` makes an mPLUG-Owl2 of one."
    raise InputError(
        f"{name_or_path} does not fit its config.json as an mPLUG-Owl2 checkpoint. Keys\n"
        + problems
        + hint
    )
