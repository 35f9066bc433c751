"""The configuration of an mPLUG-Owl2 model: the released ``config.json``, read and written.

``config.json`` is a flat LLaMA configuration with one more entry, ``visual_config``::

    {"model_type": "mplug_owl2", "hidden_size": 4096, ...,
     "visual_config": {"visual_model": {...}, "visual_abstractor": {...}}}

Defaults are the released model's (``MAGAer13/mplug-owl2-llama2-7b``). An option of ours has a
default that means the released behaviour and is left out of the file when it has it, and LLaMA's
settings are written under the names that the authors' transformers 4.31 reads, so a checkpoint
written here loads there.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from owl2.errors import InputError

DECODER_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
VISUAL_SIZES = DECODER_SIZES[1:]
AUTHORS_ARCHITECTURE = "MPLUGOwl2LlamaForCausalLM"


class Owl2VisionConfig(PreTrainedConfig):
    """The vision encoder, a ViT (SPEC 1.1); defaults: ViT-L/14 at 448 x 448 pixels."""

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
        _refuse_unless(self.use_cls_token, "visual_model.use_cls_token", False)
        _refuse_unless(self.use_post_layernorm, "visual_model.use_post_layernorm", False)
        names = (*VISUAL_SIZES, "image_size", "patch_size", "num_channels")
        check_sizes("visual_model", vars(self), names)
        if self.hidden_act not in ACT2FN:
            raise InputError(f"visual_model.hidden_act: there is no activation {self.hidden_act!r}")
        _refuse_remainder("visual_model.image_size", self.image_size, "patch_size", self.patch_size)
        _refuse_remainder(
            "visual_model.hidden_size",
            self.hidden_size,
            "num_attention_heads",
            self.num_attention_heads,
        )

    @property
    def grid_size(self) -> int:
        """Patches along one edge of the image."""
        return self.image_size // self.patch_size


class Owl2AbstractorConfig(PreTrainedConfig):
    """The visual abstractor (SPEC 1.2); defaults: 6 layers, 64 learnable queries."""

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
        _refuse_unless(self.use_cls_token, "visual_abstractor.use_cls_token", False)
        _refuse_unless(not self.add_v2t_pos_emb, "visual_abstractor.add_v2t_pos_emb", True)
        names = (*VISUAL_SIZES, "encoder_hidden_size", "num_learnable_queries")
        check_sizes("visual_abstractor", vars(self), names)
        if self.hidden_size != self.encoder_hidden_size:
            raise InputError(
                f"visual_abstractor.hidden_size ({self.hidden_size}) must equal "
                f"encoder_hidden_size ({self.encoder_hidden_size}): keys and values come from "
                "the queries and the encoder's tokens side by side"
            )
        # Two codes (sine, cosine) for each of two axes: the 2-D position code needs quarters.
        _refuse_remainder("visual_abstractor.hidden_size", self.hidden_size, "4", 4)
        _refuse_remainder(
            "visual_abstractor.hidden_size",
            self.hidden_size,
            "num_attention_heads",
            self.num_attention_heads,
        )


class Owl2VisualConfig(PreTrainedConfig):
    """``visual_config`` of ``config.json``: the vision encoder's settings and the abstractor's."""

    sub_configs = {"visual_model": Owl2VisionConfig, "visual_abstractor": Owl2AbstractorConfig}

    visual_model: Any = None
    visual_abstractor: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.visual_model = _as_config(Owl2VisionConfig, self.visual_model)
        self.visual_abstractor = _as_config(Owl2AbstractorConfig, self.visual_abstractor)
        super().__post_init__(**kwargs)
        vision, abstractor = self.visual_model, self.visual_abstractor
        if abstractor.encoder_hidden_size != vision.hidden_size:
            raise InputError(
                f"visual_abstractor.encoder_hidden_size ({abstractor.encoder_hidden_size}) must "
                f"equal visual_model.hidden_size ({vision.hidden_size})"
            )
        # The grid follows from the image; a config edited in one place only stays consistent.
        abstractor.grid_size = vision.grid_size


class Owl2Config(LlamaConfig):
    """A flat LLaMA configuration plus ``visual_config`` (SPEC 1.4).

    Args (beyond LLaMA's):
        visual_config: a dict or an `Owl2VisualConfig`.
        use_mam: with the modality-adaptive module (SPEC 1.3); ``False`` is the paper's ablation,
            one set of weights for both modalities. Written to ``config.json`` only when ``False``.

    Raises:
        InputError: for a visual part whose sizes do not fit, or that asks for something which the
            released architecture does not have.
    """

    model_type = "mplug_owl2"
    sub_configs = {"visual_config": Owl2VisualConfig}

    rms_norm_eps: float = 1e-5
    visual_config: Any = None
    use_mam: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.visual_config = _as_config(Owl2VisualConfig, self.visual_config)
        check_sizes("the decoder", vars(self), DECODER_SIZES)
        if not isinstance(self.use_mam, bool):
            raise InputError(f"use_mam must be true or false, not {self.use_mam!r}")
        super().__post_init__(**kwargs)
        check_sizes("the decoder", vars(self), ["num_key_value_heads"])
        heads, groups = self.num_attention_heads, self.num_key_value_heads or 1  # never None here
        _refuse_remainder("num_attention_heads", heads, "num_key_value_heads", groups)

    @property
    def image_token_id(self) -> int:
        """The id that stands for one visual embedding: just past the vocabulary, never embedded."""
        return self.vocab_size

    @property
    def num_image_tokens(self) -> int:
        """Embeddings an image becomes: the K learnable queries and ``vit_eos``."""
        return self.visual_config.visual_abstractor.num_learnable_queries + 1

    @property
    def image_size(self) -> int:
        """Height and width of the images that the vision encoder takes, in pixels."""
        return self.visual_config.visual_model.image_size

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: the released file's names instead of transformers 5's."""
        written = super().to_diff_dict()
        rope = dict(written.pop("rope_parameters", None) or {})
        if rope:
            written["rope_theta"] = rope.pop("rope_theta", 10000.0)
            written["rope_scaling"] = _as_rope_scaling(rope)
        if "dtype" in written:
            written["torch_dtype"] = written.pop("dtype")
        written["architectures"] = [AUTHORS_ARCHITECTURE]
        if self.use_mam:
            written.pop("use_mam", None)
        written["visual_config"] = {
            name: _own_settings(getattr(self.visual_config, name))
            for name in self.visual_config.sub_configs
        }
        return written


def _as_rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """transformers 5's rope settings as ``rope_scaling``.

    The kinds that transformers 4.31 knows are written as it wants them: `type` and `factor`, a
    float, and nothing else.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return {"type": kind, "factor": float(rope["factor"])}
    return rope


def _own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """All of a part's settings, without the general ones that every transformers config has."""
    general = PreTrainedConfig().to_dict()
    written = {key: value for key, value in config.to_dict().items() if key not in general}
    return written | {"model_type": config.model_type}


def _as_config(cls: type[PreTrainedConfig], value: Any) -> PreTrainedConfig:
    """`value` (a config, a dict from ``config.json``, or nothing) as an instance of `cls`."""
    if isinstance(value, cls):
        return value
    if value is None or isinstance(value, dict):
        return cls(**(value or {}))
    raise InputError(f"expected a {cls.__name__} or a dict, got {type(value).__name__}")


def check_sizes(part: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise an InputError unless all `names` that `values` hold are whole numbers of at least 1."""
    for name in names:
        value = values.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{part}: {name} must be a whole number of at least 1, not {value!r}")


def _refuse_unless(condition: bool, name: str, value: Any) -> None:
    if not condition:
        raise InputError(f"{name}: {value} is not part of the released mPLUG-Owl2 architecture")


def _refuse_remainder(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise InputError(f"{name} ({value}) must be a multiple of {divisor_name} ({divisor})")


AutoConfig.register(Owl2Config.model_type, Owl2Config)
