"""Loads and saves checkpoints in the released layout (Specification §1.4).

The loader of transformers does the work; it renames the keys of MAM (`weight_names`). This
module adds a strict check: a key is loaded, recomputed (position embeddings, ``inv_freq``) or
rejected with a list, and no weight is initialized silently. Position embeddings that were trained
at another resolution are resized.
"""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from owl2.checkpoints.adapters import (
    AdapterFiles,
    find_adapter,
    has_adapter,
    load_adapter,
    save_adapter,
)
from owl2.checkpoints.config_file import (
    HUB_ARGS,
    check_generation_config,
    read_config,
    resolve_checkpoint,
)
from owl2.checkpoints.from_backbones import backbone_config, backbone_weights
from owl2.checkpoints.hf_quantizer import (
    Owl2QuantizationConfig,
    Owl2Quantizer,
    StoredDtypeLinear,
    check_quantization,
    keep_stored_dtype,
    stored_quantization,
)
from owl2.checkpoints.key_report import (
    REPORT_KEYS,
    check_keys,
    check_loading_info,
    listing,
    translate_load_errors,
)
from owl2.checkpoints.lazy_weights import WeightReader, loaded_share, rank_share
from owl2.checkpoints.load_memory import require_load_memory
from owl2.checkpoints.quantized_weights import check_shapes, weights_to_load
from owl2.checkpoints.remote_code import add_remote_code
from owl2.checkpoints.weight_files import (
    Provenance,
    complete_index,
    find_tensor,
    read_tensors,
    weight_files,
)
from owl2.checkpoints.weight_names import HEAD_WEIGHT, POSITIONS, module_name, released_name
from owl2.errors import ErrorCode, InputError
from owl2.files import apply_umask, expand_user

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, LlamaForCausalLM

logger = logging.get_logger(__name__)
BASE_PREFIX = "model."  # of all names but that of the head; files of an `Owl2Model` lack both
FRESH_PARTS = ("model.visual_abstractor.", "model.vision_model.")
# Old config.json files contain every default of transformers. This one would limit answers, or
# cause a warning whenever max_new_tokens is set.
UNSET_MAX_LENGTH = 20


class CheckpointMixin(PreTrainedModel):
    """`from_pretrained` with a strict check of all keys; adapters; models from backbones.

    Attributes:
        provenance: The checkpoint that the model was loaded from, if any.
    """

    provenance: Provenance | None = None

    # Computed, not learned: recomputed if a checkpoint does not contain them.
    _keys_to_ignore_on_load_missing = [r"attention\.[qk]_pos_embed$"]
    # Old LLaMA checkpoints contain these, which are computed from the configuration.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a narrower, documented signature
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        image_size: int | None = None,
        base: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint in the released layout, or an adapter and its base model.

        Args:
            pretrained_model_name_or_path: A directory or a hub id with ``config.json`` and
                ``pytorch_model*.bin`` or ``*.safetensors``, sharded with an index or not; pickles
                are read with ``weights_only=True``. Or a directory with an adapter
                (`owl2.checkpoints.adapters`). None with ``config`` and ``state_dict``.
            base: For an adapter: the base model, instead of the one that the adapter names.
            image_size: Resolution in pixels; position embeddings are resized bicubically.
            kwargs: As in transformers' ``from_pretrained`` (``dtype``, ``attn_implementation``,
                ``device_map``, ``quantization_config`` ...). With ``output_loading_info=True`` the
                keys that do not fit are returned and are not an error.

        Raises:
            InputError: The checkpoint is not an mPLUG-Owl2; a key is missing, unexpected or of
                another shape (the message lists them); or an adapter's base model is missing.
        """
        if (given := pretrained_model_name_or_path) is None:
            loaded = cls._load(None, *args, **kwargs)
            return _checked(*loaded, "state_dict", kwargs)
        name_or_path = resolve_checkpoint(given, revision=kwargs.get("revision"))
        # transformers' Auto classes replace the name of an adapter by the name of its base.
        requested = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path", name_or_path)
        hub = {name: kwargs[name] for name in HUB_ARGS if name in kwargs}
        if adapter := find_adapter(requested, hub):
            return cls._load_with_adapter(adapter, base, image_size, *args, **kwargs)
        if base is not None:
            raise InputError(
                f"base=... is for adapters, but {name_or_path} is a complete model",
                ErrorCode.CONFLICT,
            )
        config = kwargs.get("config")
        config = read_config(name_or_path, **hub) if config is None else copy.deepcopy(config)
        check_quantization(name_or_path, config, kwargs)
        folder = Path(name_or_path) / (kwargs.get("subfolder") or "")
        safetensors = kwargs.get("use_safetensors") is not False
        if folder.is_dir():
            check_generation_config(folder)
            cls._check_weights(name_or_path, folder, config, safetensors, kwargs)
        positions, tensor = _stored_positions(name_or_path, safetensors, hub)
        stored = _image_size(tensor, config)
        if stored not in (None, config.image_size):
            # Weights and configuration have different resolutions: load, then resize.
            image_size = image_size or config.image_size
            config.visual_config.set_image_size(stored)
            kwargs["config"] = config
        elif type(config) is not cls.config_class:  # of a sibling in the registry
            kwargs["config"] = config
        with complete_index(name_or_path, safetensors, hub) as source:
            model, info = cls._load(source, *args, **kwargs)
        model.name_or_path = str(name_or_path)
        _cast_unquantized(model)
        is_base = positions == POSITIONS.removeprefix(BASE_PREFIX)
        loaded = _checked(model, info, name_or_path, kwargs, is_base)
        if model.can_generate() and model.generation_config.max_length == UNSET_MAX_LENGTH:
            model.generation_config.max_length = None
        if image_size is not None:
            model.set_image_size(image_size)
        model.provenance = Provenance.of(name_or_path, hub)
        if name_or_path != str(expand_user(given)):  # downloaded from ModelScope
            model.provenance = replace(model.provenance, name=str(given))
        return loaded

    @classmethod
    def _load_with_adapter(
        cls,
        adapter: AdapterFiles,
        base: str | Path | None,
        image_size: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The base model with the adapter applied, frozen and in evaluation mode."""
        for name in ("adapter_kwargs", "revision", "subfolder"):  # of the adapter, not of its base
            kwargs.pop(name, None)
        hub = {name: kwargs[name] for name in HUB_ARGS if name in kwargs}
        base_name, revision = adapter.base(base, hub)
        if kwargs.get("config"):
            config = kwargs["config"] = copy.deepcopy(kwargs["config"])
            # The Auto classes pass the adapter's configuration. Its image size is applied later.
            base_config = read_config(base_name, revision=revision, **hub)
            config.visual_config.set_image_size(base_config.image_size)
        if revision is not None:
            kwargs["revision"] = revision
        loaded = cls.from_pretrained(base_name, *args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        if adapter.image_size is not None:
            model.set_image_size(adapter.image_size)
        load_adapter(model, adapter)
        if image_size is not None:
            model.set_image_size(image_size)
        model.eval()
        return loaded

    @classmethod
    def from_backbones(
        cls,
        llm: "LlamaForCausalLM",
        vision: "CLIPVisionModel | dict[str, Any] | None" = None,
        *,
        abstractor: dict[str, Any] | None = None,
        image_size: int | None = None,
        use_mam: bool = True,
        mam_modules: "list[str] | None" = None,
    ) -> Any:
        """Create an untrained mPLUG-Owl2 from a LLaMA and a vision encoder, in the LLaMA's dtype.

        The visual weights of the decoder are copies of its text weights, so that text-only logits
        are bit-identical to those of the LLaMA.

        Args:
            llm: The language model. Its weights are used without a copy where possible.
            vision: A CLIP vision tower, or options of a new ViT (`Owl2VisionConfig`); default
                ViT-L/14.
            abstractor: Options of the abstractor (`Owl2AbstractorConfig`); its widths default to
                the vision encoder's, its queries to 64.
            image_size: Pixels. Position embeddings of a CLIP tower are resized bicubically.
            use_mam: False for the paper's ablation, one set of weights for both modalities.
            mam_modules: The modules with separate weights, see `Owl2Config`; default: all.

        Raises:
            InputError: The language model is not a LLaMA, or sizes do not fit.
        """
        mam = {"use_mam": use_mam, "mam_modules": mam_modules}
        config = backbone_config(llm, vision, abstractor, image_size, **mam)
        weights = backbone_weights(llm, vision, config.separate_modules)
        model, info = cls._load(None, config=config, state_dict=weights, dtype=llm.dtype)
        missing = [key for key in info["missing_keys"] if not key.startswith(FRESH_PARTS)]
        check_loading_info("the backbone", {**info, "missing_keys": missing})
        if llm.generation_config is not None:
            model.generation_config = llm.generation_config
        if image_size is not None:
            model.set_image_size(image_size)
        return model

    def save_pretrained(  # type: ignore[override]  # other arguments as in transformers
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; for a model with an adapter, write only the adapter.

        transformers would omit the parts that were trained completely (``modules_to_save``).
        """
        quantization = stored_quantization(self.config)
        if quantization and self.provenance:  # it may have been quantized while it was loaded
            quantization.base_fingerprint = self.provenance.fingerprint
        if not has_adapter(self):
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        elif is_main_process:
            save_adapter(self, save_directory, state_dict)
        if is_main_process:
            apply_umask(Path(save_directory).glob("*.safetensors"))

    def _upload_modified_files(  # type: ignore[override]  # passes all other arguments through
        self, working_dir: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """The last step of `push_to_hub`; the uploaded checkpoint can be loaded without owl2."""
        add_remote_code(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: classes of the package are registered, and their code is never copied."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As in torch, also inside of a wrapper; the keys may have their released names."""
        for key in list(state_dict):
            if (name := module_name(key)) != key:
                state_dict[name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    def load_adapter(self, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the adapter's target modules may have their released names.

        Raises:
            InputError: A weight of LoRA in the adapter has no module in the model.
        """
        hub = {name: kwargs[name] for name in HUB_ARGS if name in kwargs}
        adapter = find_adapter(peft_model_id, hub, only_lora=False) if peft_model_id else None
        if adapter and len(args) < 2:
            kwargs.setdefault("peft_config", adapter.config)
        info = super().load_adapter(peft_model_id, *args, **kwargs)
        unexpected = {key for key in info.unexpected_keys if ".lora_" in key}
        check_keys(peft_model_id or "the adapter", unexpected=map(released_name, unexpected))
        return info

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        """As in transformers; weights that are quantized or sharded are read lazily."""
        quantizer, share = load_config.hf_quantizer, loaded_share.get()
        files = [Path(file) for file in checkpoint_files or ()]
        if files and isinstance(quantizer, Owl2Quantizer):
            reader = WeightReader(files)
            keep_stored_dtype(model, reader.tensors)
            check_shapes(model, reader, quantizer)
            state_dict = weights_to_load(reader, quantizer, model.config.hidden_size)
        elif files and share is not None:
            state_dict = rank_share(model, WeightReader(files), share, load_config.dtype)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kw
        )

    @classmethod
    def _check_weights(
        cls, name: str | Path, folder: Path, config: Any, safetensors: bool, options: dict[str, Any]
    ) -> None:
        """Reject corrupt files, integers, which would be converted, and a lack of memory."""
        files = weight_files(folder, safetensors)
        tensors = {key: one for file in files for key, one in read_tensors(file).items()}
        integers = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
        is_quantized = getattr(config, "quantization_config", None) is not None
        if integers and not is_quantized and not options.get("output_loading_info"):
            keys = listing("integers", integers)
            raise InputError(
                f"{folder}: weights must be floating-point tensors\n{keys}",
                ErrorCode.INVALID_FORMAT,
            )
        given, dtype = options.get("quantization_config"), options.get("dtype")
        # With a device map or in sharded training, the CPU does not load all weights.
        on_cpu = options.get("device_map") is None and loaded_share.get() is None
        if on_cpu and isinstance(given, Owl2QuantizationConfig | None):
            sizes = {file.name: file.stat().st_size for file in files}
            dtype = dtype if isinstance(dtype, torch.dtype) else None
            ignored = "|".join(cls._keys_to_ignore_on_load_unexpected)
            loaded = {key: one for key, one in tensors.items() if not re.search(ignored, key)}
            require_load_memory(str(name), loaded, sizes, dtype, given)

    @classmethod
    def _load(cls, name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        with translate_load_errors(name_or_path):
            loaded: Any = super().from_pretrained(name_or_path, *args, **(kwargs | REPORT_KEYS))
        return loaded


def _checked(
    model: Any, info: dict, source: str | Path, options: dict[str, Any], is_base: bool = False
) -> Any:
    """The model, after a check of its keys; with ``output_loading_info``, the keys instead."""
    if options.get("output_loading_info"):
        return model, info
    missing, hint = set(info["missing_keys"]), ""
    if is_base and HEAD_WEIGHT in missing:
        logger.warning("%s has no %s, which is initialized randomly", source, HEAD_WEIGHT)
        missing.remove(HEAD_WEIGHT)
    if any(key.endswith("self_attn.k_proj.weight") for key in info["unexpected_keys"]):
        hint = "\nThis may be a LLaMA; `owl2 init` creates an mPLUG-Owl2 from a LLaMA."
    shapes = () if options.get("ignore_mismatched_sizes") else info["mismatched_keys"]
    check_loading_info(source, {**info, "missing_keys": missing, "mismatched_keys": shapes}, hint)
    return model


def _cast_unquantized(model: Any) -> None:
    """Convert the weights of a quantized checkpoint that are not stored in the requested dtype.

    transformers converts only some of them.
    """
    dtype = getattr(model.config, "dtype", None)
    if getattr(model.config, "quantization_config", None) and isinstance(dtype, torch.dtype):
        kept = {id(m.weight) for m in model.modules() if isinstance(m, StoredDtypeLinear)}
        for parameter in model.parameters():
            # Packed 4-bit weights may be stored in a floating-point dtype.
            is_packed = hasattr(parameter, "quant_state")
            if parameter.is_floating_point() and not is_packed and id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)


def _stored_positions(
    name: str | Path, safetensors: bool, hub: dict[str, Any]
) -> tuple[str, torch.Tensor | None]:
    """The key and the tensor (without values) of the stored position embeddings, or ("", None).

    Reads the header of the file that contains them. From the hub it is downloaded, as loading does.
    """
    for key in (POSITIONS, POSITIONS.removeprefix(BASE_PREFIX)):
        file = find_tensor(name, key, safetensors, hub)
        tensors = read_tensors(file) if file else {}
        if key in tensors:
            return key, tensors[key]
    return "", None


def _image_size(positions: torch.Tensor | None, config: Any) -> int | None:
    """The image size in pixels of position embeddings; None if it cannot be derived."""
    shape = () if positions is None else tuple(positions.shape)
    grid = round((shape[1] - 1) ** 0.5) if len(shape) == 3 and shape[1] > 1 else 0
    if grid < 1 or shape[1] != 1 + grid**2:
        return None
    return grid * int(config.visual_config.visual_model.patch_size)
