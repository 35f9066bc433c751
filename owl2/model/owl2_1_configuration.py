"""Configuration of mPLUG-Owl2.1 (Model family §7.1): the names of Qwen in ``config.json``.

The decoder of owl2 reads LLaMA's names, which are derived here and are not written to the file.
"""

import math
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from owl2.model.configuration import (
    Owl2AbstractorConfig,
    Owl2Config,
    Owl2VisionConfig,
    Owl2VisualConfig,
    check_sizes,
    invalid,
    require_values,
)

# LLaMA's names that the file has as well. All others of LLaMA are derived or unused.
_SHARED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "initializer_range", "use_cache"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
}

RANKS, SPECIAL_TOKENS = 151643, 208  # of the published tokenizer


class Owl2_1VisionConfig(Owl2VisionConfig):  # the version is in the name
    """A ViT without a class token and without a final norm. Defaults: ViT-G/14.

    Attributes:
        position_grid: The edge of the grid of stored position embeddings, which are interpolated
            to the patches of an image.
    """

    hidden_size: int = 1664
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    intermediate_size: int = 8192
    hidden_act: str = "gelu"
    use_cls_token: bool = False
    use_post_layernorm: bool = False
    position_grid: int = 16

    def check_released_options(self) -> None:
        """Raise an InputError for options that no code of this model type supports."""
        require_values("visual_model", vars(self), use_cls_token=False, use_post_layernorm=False)


class Owl2_1AbstractorConfig(Owl2AbstractorConfig):
    """The abstractor for features without a class token."""

    hidden_size: int = 1664
    encoder_hidden_size: int = 1664
    use_cls_token: bool = False


class Owl2_1VisualConfig(Owl2VisualConfig):
    """The vision encoder and the visual abstractor."""

    sub_configs = {
        "visual_model": Owl2_1VisionConfig,
        "visual_abstractor": Owl2_1AbstractorConfig,
    }


class Owl2_1Config(Owl2Config):
    """``config.json`` of mPLUG-Owl2.1: a flat Qwen configuration plus ``visual_config``.

    Args:
        multiway: Use the modality-adaptive module; the same as `use_mam`.
        intermediate_size: Twice the inner width of the MLP.
        kv_channels: Width of an attention head.
        seq_length: The length of the training sequences. Beyond it, queries are scaled
            (`use_logn_attn`), and rotary embeddings have a larger base (`use_dynamic_ntk`).
        no_bias: No bias in the decoder, except that of the projection to queries, keys and values.

    Raises:
        InputError: As `Owl2Config`.
    """

    model_type = "mplug_owl2_1"
    sub_configs = {"visual_config": Owl2_1VisualConfig}
    authors_architecture = "MPLUGOwl2QWenForCausalLM"
    authors_vision_act = "gelu"
    mam_module_names = ("c_attn",)

    vocab_size: int = 151851
    intermediate_size: int = 22016
    max_position_embeddings: int = 8192
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    multiway: bool = True
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    kv_channels: int = 128
    layer_norm_epsilon: float = 1e-6
    no_bias: bool = True
    rotary_emb_base: float = 10000
    rotary_pct: float = 1.0
    scale_attn_weights: bool = True
    seq_length: int = 2048
    tokenizer_type: str = "QWenTokenizer"
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_flash_attn: Any = False
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    onnx_safe: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes("decoder", vars(self), ("kv_channels", "seq_length"))
        self.use_mam = self.multiway = bool(self.multiway and self.use_mam)
        self.rms_norm_eps, self.head_dim = self.layer_norm_epsilon, self.kv_channels
        self.num_key_value_heads = None
        self.attention_dropout = self.attn_dropout_prob
        self.rope_parameters = {"rope_type": "default", "rope_theta": float(self.rotary_emb_base)}
        if self.eos_token_id is None and self.vocab_size > SPECIAL_TOKENS:
            # `<|endoftext|>` is the first token after the ranks.
            self.eos_token_id = min(self.vocab_size - SPECIAL_TOKENS, RANKS)
        super().__post_init__(**kwargs)
        if self.intermediate_size % 2:
            raise invalid(f"decoder.intermediate_size ({self.intermediate_size}) must be even")
        require_values("decoder", vars(self), scale_attn_weights=True)
        if self.rotary_pct != 1 or self.seq_length < 2:
            raise invalid(
                f"decoder: rotary_pct is {self.rotary_pct} and seq_length {self.seq_length}; they "
                "must be 1 and at least 2"
            )

    @property
    def has_dynamic_ntk(self) -> bool:  # type: ignore[override]  # depends on an option
        """Whether `ntk_alpha` is not 1 for all prompts."""
        return self.use_dynamic_ntk

    def ntk_alpha(self, num_tokens: int) -> float:
        """1 up to `seq_length` tokens; 3, 7, ... for up to 2, 4, ... times as many."""
        if not self.use_dynamic_ntk or num_tokens <= self.seq_length:
            return 1.0
        return 2.0 ** math.ceil(math.log2(num_tokens / self.seq_length) + 1) - 1

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of ``config.json`` without the names of LLaMA."""
        written = super().to_diff_dict()
        derived = LlamaConfig().to_dict().keys() - PreTrainedConfig().to_dict().keys() - _SHARED
        derived |= {"rope_theta", "rope_scaling", "use_mam"}
        kept = {key: value for key, value in written.items() if key not in derived}
        return kept | {"multiway": self.multiway}


AutoConfig.register(Owl2_1Config.model_type, Owl2_1Config)
