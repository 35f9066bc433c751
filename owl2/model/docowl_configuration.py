"""Configuration of DocOwl1.5 and DocOwl2 (Model family §8.1, §9).

Both have the model type ``mplug_docowl``. ``visual_hrcompressor`` in ``visual_config`` makes a
checkpoint a DocOwl2.
"""

from math import ceil
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from owl2.model.configuration import (
    Owl2Config,
    Owl2VisionConfig,
    VisualConfig,
    as_config,
    check_sizes,
    invalid,
    require_multiple,
)


class HReducerConfig(PreTrainedConfig):
    """H-Reducer (Model family §8.2).

    Attributes:
        conv_shape: Rows and columns of patches that one embedding covers, ``"1x4"``.
        hidden_size: Width D of the vision encoder.
    """

    model_type = "mplug_docowl_hreducer"

    conv_shape: str = "1x4"
    hidden_size: int = 1024
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_sizes("visual_hreducer", vars(self), ("hidden_size",))
        rows, _, columns = self.conv_shape.partition("x")
        if rows != "1" or not columns.isdecimal() or int(columns) < 1:
            raise invalid(
                f"visual_hreducer.conv_shape is {self.conv_shape!r}; it must be one row and a "
                "number of columns, such as '1x4'"
            )

    @property
    def columns(self) -> int:
        """Neighboring patches that one embedding covers."""
        return int(self.conv_shape.partition("x")[2])


class HRCompressorConfig(PreTrainedConfig):
    """Compressor of the crops of a page (Model family §9)."""

    model_type = "mplug_docowl_hrcompressor"

    layer: int = 2
    high_reso_cross_num_att_heads: int = 16
    high_reso_cross_hid_size: int = 4096
    high_reso_cross_dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = ("layer", "high_reso_cross_num_att_heads", "high_reso_cross_hid_size")
        check_sizes("visual_hrcompressor", vars(self), sizes)
        require_multiple("visual_hrcompressor", vars(self), sizes[2], sizes[1])

    @property
    def hidden_size(self) -> int:
        """Width, that of the decoder."""
        return self.high_reso_cross_hid_size

    @property
    def intermediate_size(self) -> int:
        """Inner width of the MLP: two thirds of 4 times the width, a multiple of 256."""
        return 256 * ceil(int(8 * self.hidden_size / 3) / 256)


class DocOwlVisualConfig(VisualConfig):
    """The vision encoder, H-Reducer, and for DocOwl2 the compressor."""

    sub_configs = {
        "visual_model": Owl2VisionConfig,
        "visual_hreducer": HReducerConfig,
        "visual_hrcompressor": HRCompressorConfig,
    }

    visual_model: Any = None
    visual_hreducer: Any = None
    visual_hrcompressor: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.visual_model = as_config(Owl2VisionConfig, self.visual_model)
        self.visual_hreducer = as_config(HReducerConfig, self.visual_hreducer)
        if self.visual_hrcompressor is not None:
            self.visual_hrcompressor = as_config(HRCompressorConfig, self.visual_hrcompressor)
        super().__post_init__(**kwargs)
        vision, reducer = self.visual_model, self.visual_hreducer
        if reducer.hidden_size != vision.hidden_size:
            raise invalid(
                f"visual_hreducer.hidden_size ({reducer.hidden_size}) must equal "
                f"visual_model.hidden_size ({vision.hidden_size})"
            )
        self.set_image_size(vision.image_size)

    @property
    def connector(self) -> "DocOwlVisualConfig":
        """All parts: the connector also reads the patch grid."""
        return self

    @property
    def connector_shape(self) -> str:
        """The sizes of H-Reducer and of the compressor."""
        shape = f"H-Reducer {self.visual_hreducer.conv_shape}"
        if (compressor := self.visual_hrcompressor) is None:
            return shape
        return f"{shape}, {compressor.layer} layers of width {compressor.hidden_size}"

    @property
    def num_image_tokens(self) -> int:
        """The reduced patches of a crop, or of the whole page for DocOwl2, and an end token."""
        grid: int = self.visual_model.grid_size
        return grid * grid // self.visual_hreducer.columns + 1

    @property
    def has_image_grids(self) -> bool:
        """DocOwl2 compresses the crops of a page."""
        return self.visual_hrcompressor is not None

    def set_image_size(self, image_size: int) -> None:
        """Set the edge of a crop in pixels."""
        self.visual_model.image_size = image_size
        sizes = {"patches in a row": self.visual_model.grid_size}
        require_multiple("visual_model", sizes, "patches in a row", self.visual_hreducer.columns)


class DocOwlConfig(Owl2Config):
    """``config.json`` of DocOwl1.5 and DocOwl2.

    Raises:
        InputError: As `Owl2Config`; also if the widths of compressor and decoder differ.
    """

    model_type = "mplug_docowl"
    sub_configs = {"visual_config": DocOwlVisualConfig}
    authors_architecture = "MPLUGDocOwlLlamaForCausalLM"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        compressor = self.visual_config.visual_hrcompressor
        if compressor is not None and compressor.hidden_size != self.hidden_size:
            raise invalid(
                f"visual_hrcompressor.high_reso_cross_hid_size ({compressor.hidden_size}) must "
                f"equal hidden_size ({self.hidden_size})"
            )

    @property
    def registry_key(self) -> str:
        """DocOwl2 has a compressor."""
        return "mplug_docowl2" if self.visual_config.has_image_grids else self.model_type

    def to_diff_dict(self) -> dict[str, Any]:
        """As for mPLUG-Owl2, with the class of DocOwl2."""
        written = super().to_diff_dict()
        if written.get("architectures") and self.registry_key == "mplug_docowl2":
            written["architectures"] = ["mPLUGDocOwl2"]
        return written


AutoConfig.register(DocOwlConfig.model_type, DocOwlConfig)
