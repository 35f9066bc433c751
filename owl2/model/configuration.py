"""Configuration of an mPLUG-Owl2 model: reads and writes the released ``config.json``.

``config.json`` is a flat LLaMA configuration with the additional entry ``visual_config``::

    {"model_type": "mplug_owl2", "hidden_size": 4096, ...,
     "visual_config": {"visual_model": {...}, "visual_abstractor": {...}}}

Defaults are those of the released model (``MAGAer13/mplug-owl2-llama2-7b``). Options that only owl2
has default to the released behavior and are omitted from the file at their default. LLaMA's options
are written under the names that transformers 4.31 reads, so the authors' code loads the checkpoint.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from owl2.errors import ErrorCode, InputError

DECODER_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
VISUAL_SIZES = DECODER_SIZES[1:]


class Owl2VisionConfig(PreTrainedConfig):
    """Vision encoder, a ViT (Specification §1.1). Defaults: ViT-L/14 at 448 x 448 pixels."""

    model_type = "mplug_owl_vision_model"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cls_token: bool = True
    use_post_layernorm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        names = (*VISUAL_SIZES, "image_size", "patch_size", "num_channels")
        check_sizes("visual_model", vars(self), names)
        self.check_released_options()
        if self.hidden_act not in ACT2FN:
            raise invalid(f"visual_model.hidden_act: unknown activation {self.hidden_act!r}")
        require_multiple("visual_model", vars(self), "image_size", "patch_size")
        require_multiple("visual_model", vars(self), "hidden_size", "num_attention_heads")

    def check_released_options(self) -> None:
        """Raise an InputError for options that no code of this model type supports."""
        require_values("visual_model", vars(self), use_cls_token=True, use_post_layernorm=True)

    @property
    def grid_size(self) -> int:
        """Number of patches along one edge of the image."""
        return self.image_size // self.patch_size


class Owl2AbstractorConfig(PreTrainedConfig):
    """Visual abstractor (Specification §1.2). Defaults: 6 layers, 64 learnable queries."""

    model_type = "mplug_owl_visual_abstract"

    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    num_learnable_queries: int = 64
    grid_size: int = 32
    layer_norm_eps: float = 1e-6
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    use_cls_token: bool = True
    add_v2t_pos_emb: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        names = (*VISUAL_SIZES, "encoder_hidden_size", "num_learnable_queries")
        check_sizes("visual_abstractor", vars(self), names)
        require_values("visual_abstractor", vars(self), add_v2t_pos_emb=False)
        if self.hidden_size != self.encoder_hidden_size:
            raise invalid(
                f"visual_abstractor.hidden_size ({self.hidden_size}) must equal "
                f"encoder_hidden_size ({self.encoder_hidden_size}): keys and values are computed "
                "from the concatenation of the queries and the encoder's features"
            )
        # The 2-D position embedding has a sine and a cosine for each of two axes.
        require_multiple("visual_abstractor", vars(self), "hidden_size", 4)
        require_multiple("visual_abstractor", vars(self), "hidden_size", "num_attention_heads")


class VisualConfig(PreTrainedConfig):
    """``visual_config`` of ``config.json``: the vision encoder and the parts of the connector.

    A model type has a subclass. `sub_configs` are the names and the classes of the parts. It has
    the properties `connector`, the configuration that the connector is created with,
    `connector_shape`, its sizes for people, and `num_image_tokens`, the embeddings of an image;
    and `set_image_size(pixels)`.
    """

    base_config_key = "visual_config"

    @property
    def parts(self) -> dict[str, Any]:
        """The configurations of the parts by name."""
        found = {name: getattr(self, name) for name in self.sub_configs}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def has_image_grids(self) -> bool:
        """Whether several crops in `pixel_values` are one image; `image_grids` describe them."""
        return False


class Owl2VisualConfig(VisualConfig):
    """The vision encoder and the visual abstractor."""

    sub_configs = {"visual_model": Owl2VisionConfig, "visual_abstractor": Owl2AbstractorConfig}

    visual_model: Any = None
    visual_abstractor: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, cls in self.sub_configs.items():
            setattr(self, name, as_config(cls, getattr(self, name)))
        super().__post_init__(**kwargs)
        vision, abstractor = self.visual_model, self.visual_abstractor
        if abstractor.use_cls_token != vision.use_cls_token:
            raise invalid("visual_abstractor.use_cls_token must equal visual_model.use_cls_token")
        if abstractor.encoder_hidden_size != vision.hidden_size:
            raise invalid(
                f"visual_abstractor.encoder_hidden_size ({abstractor.encoder_hidden_size}) must "
                f"equal visual_model.hidden_size ({vision.hidden_size})"
            )
        # The grid follows from the image size, so that a config edited in one place is consistent.
        abstractor.grid_size = vision.grid_size

    @property
    def connector(self) -> Owl2AbstractorConfig:
        """The visual abstractor."""
        abstractor: Owl2AbstractorConfig = self.visual_abstractor
        return abstractor

    @property
    def connector_shape(self) -> str:
        """The sizes of the abstractor."""
        return f"{self.connector.num_hidden_layers} layers, width {self.connector.hidden_size}"

    @property
    def num_image_tokens(self) -> int:
        """The K learnable queries and ``vit_eos``."""
        return self.connector.num_learnable_queries + 1

    def set_image_size(self, image_size: int) -> None:
        """Set the image size in pixels and the abstractor's patch grid."""
        self.visual_model.image_size = image_size
        self.visual_abstractor.grid_size = self.visual_model.grid_size


class Owl2Config(LlamaConfig):
    """A flat LLaMA configuration plus ``visual_config`` (Specification §1.4).

    Args (in addition to LLaMA's):
        visual_config: A dict or an `Owl2VisualConfig`.
        use_mam: Use the modality-adaptive module (Specification §1.3). ``False`` is the paper's
            ablation with one set of weights for both modalities. ``config.json`` contains the
            option only if it is ``False``.
        mam_modules: Names of the decoder's modules that have separate weights for each modality;
            the others are shared. ``None``: all of `mam_module_names`, as in the released model.
            ``config.json`` contains the option only if it is a part of them.
        image_token_id: Id of the tokenizer's ``<|image|>``, which marks a visual position. Default:
            `vocab_size`, the first id without an embedding row. It does not change if tokens are
            added, and ``config.json`` contains it only if it is not `vocab_size`.

    Raises:
        InputError: Sizes of the visual parts do not fit, or an option asks for something that the
            released architecture does not have.
    """

    model_type = "mplug_owl2"
    sub_configs = {"visual_config": Owl2VisualConfig}
    base_model_tp_plan: ClassVar[Any] = (
        None  # LLaMA's has no entries for the weights of each modality
    )
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it if `architectures` is not transformers'
    # The class of the authors' code, which `config.json` names.
    authors_architecture: ClassVar[str] = "MPLUGOwl2LlamaForCausalLM"
    authors_vision_act: ClassVar[str] = "quick_gelu"  # of the authors' code, whatever the file says
    has_dynamic_ntk: ClassVar[bool] = False  # see `ntk_alpha`
    # The modules that have weights for each modality in the released model.
    mam_module_names: ClassVar[tuple[str, ...]] = (
        "input_layernorm",
        "post_attention_layernorm",
        "k_proj",
        "v_proj",
    )

    visual_config: Any = None
    use_mam: bool = True
    mam_modules: Any = None
    image_token_id: Any = None  # an int after __post_init__

    def __post_init__(self, **kwargs: Any) -> None:
        visual_class: Any = self.sub_configs["visual_config"]
        self.visual_config = as_config(visual_class, self.visual_config)
        check_sizes("decoder", vars(self), DECODER_SIZES)
        if not isinstance(self.use_mam, bool):
            raise invalid(f"use_mam must be true or false, not {self.use_mam!r}")
        if self.mam_modules is not None:
            self.mam_modules = self._checked_mam_modules(self.mam_modules)
        if self.image_token_id is None:
            self.image_token_id = self.vocab_size
        if not isinstance(self.image_token_id, int) or self.image_token_id < 0:
            raise invalid(f"image_token_id must be a token id, not {self.image_token_id!r}")
        super().__post_init__(**kwargs)
        check_sizes("decoder", vars(self), ["num_key_value_heads"])
        require_multiple("decoder", vars(self), "num_attention_heads", "num_key_value_heads")

    def _checked_mam_modules(self, names: Any) -> list[str] | None:
        """`mam_modules` in the order of `mam_module_names`, and None for all of them."""
        known = self.mam_module_names
        is_list = isinstance(names, list | tuple) and names
        if not is_list or any(name not in known for name in names):
            raise invalid(
                f"mam_modules must be a list of some of {', '.join(known)}, not {names!r}; "
                "`use_mam: false` shares all modules"
            )
        return None if set(names) == set(known) else [name for name in known if name in names]

    @property
    def separate_modules(self) -> tuple[str, ...]:
        """Names of the decoder's modules with separate weights for each modality; () without MAM.

        These are the ends of the modules' names in each layer.
        """
        if not self.use_mam:
            return ()
        return self.mam_module_names if self.mam_modules is None else tuple(self.mam_modules)

    @property
    def registry_key(self) -> str:
        """The name of the model type in `owl2.model.registry`."""
        return self.model_type

    def ntk_alpha(self, num_tokens: int) -> float:
        """The factor by which a prompt of this length scales the base of its rotary embeddings.

        It is kept while the answer is generated. 1 for models without dynamic NTK scaling.
        """
        return 1.0

    @property
    def vision_config(self) -> Owl2VisionConfig:
        """The vision encoder, under the name that most vision-language models use."""
        vision: Owl2VisionConfig = self.visual_config.visual_model
        return vision

    def validate(self) -> None:
        """As in transformers, which warns of ids without a row; the image token needs none."""
        image_token_id, self.image_token_id = self.image_token_id, None
        try:
            super().validate()  # type: ignore[misc]  # added by a decorator of the base class
        finally:
            self.image_token_id = image_token_id

    @property
    def num_image_tokens(self) -> int:
        """Embeddings per image token's image, K + 1 (K learnable queries and ``vit_eos``)."""
        return int(self.visual_config.num_image_tokens)

    @property
    def image_size(self) -> int:
        """Height and width of the vision encoder's input in pixels."""
        return self.visual_config.visual_model.image_size

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: the class is registered, and its code is never copied to a checkpoint."""

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of ``config.json``: the released file's names instead of transformers 5's."""
        written = super().to_diff_dict()
        rope = dict(written.pop("rope_parameters", None) or {})
        if rope:
            written["rope_theta"] = rope.pop("rope_theta", 10000.0)
            written["rope_scaling"] = _as_rope_scaling(rope)
        if "dtype" in written:
            written["torch_dtype"] = written.pop("dtype")
        if written.get("architectures"):  # set by the model
            written["architectures"] = [self.authors_architecture]
        written.pop("auto_map", None)  # names code that is not saved
        if self.use_mam:
            written.pop("use_mam", None)
        if self.mam_modules is None:
            written.pop("mam_modules", None)
        written.pop("image_token_id", None)
        if self.image_token_id != self.vocab_size:
            written["image_token_id"] = self.image_token_id
        # Options that every transformers config has are omitted from the visual parts.
        general = PreTrainedConfig().to_dict()
        written["visual_config"] = {}
        for name, part in self.visual_config.parts.items():
            own = {key: value for key, value in part.to_dict().items() if key not in general}
            written["visual_config"][name] = own | {"model_type": part.model_type}
        return written


def _as_rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The RoPE parameters of transformers 5 as ``rope_scaling``.

    transformers 4.31 supports two kinds and accepts exactly `type` and a float `factor` for them.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return {"type": kind, "factor": float(rope["factor"])}
    return rope


def as_config(cls: type[PreTrainedConfig], value: Any) -> PreTrainedConfig:
    """`value` (a config, a dict from ``config.json``, or None) as an instance of `cls`."""
    if isinstance(value, cls):
        return value
    if value is None or isinstance(value, dict):
        return cls(**(value or {}))
    raise invalid(f"expected a {cls.__name__} or a dict, got {type(value).__name__}")


def check_sizes(part: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise an InputError unless all `names` in `values` are positive integers."""
    for name in names:
        value = values.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise invalid(f"{part}.{name} must be an integer of at least 1, not {value!r}")


def require_values(part: str, values: Mapping[str, Any], **released: bool) -> None:
    for name, value in released.items():
        if bool(values[name]) != value:
            raise invalid(f"{part}.{name}: the released architecture supports only {value}")


def require_multiple(
    part: str, values: Mapping[str, Any], name: str, divisor_name: str | int
) -> None:
    divisor = values[divisor_name] if isinstance(divisor_name, str) else divisor_name
    if values[name] % divisor:
        raise invalid(
            f"{part}.{name} ({values[name]}) must be a multiple of {divisor_name} ({divisor})"
        )


def invalid(message: str) -> InputError:
    return InputError(message, ErrorCode.INVALID_CONFIG)


AutoConfig.register(Owl2Config.model_type, Owl2Config)
