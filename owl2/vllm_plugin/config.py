"""The configuration of vLLM for a checkpoint, before it is loaded."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from owl2.errors import ErrorCode, InputError
from owl2.vllm_plugin import TOKENIZER_MODE


class VllmModelConfig(VerifyAndUpdateConfig):
    """Hooks that vLLM calls with its own configuration objects."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Use the token ids and pixels of training.

        The tokenizer is the checkpoint's own instead of a converted one. Images keep the mode of
        their files instead of vLLM's RGB; `processing.ImageParser` converts transparent and 16-bit
        images.
        """
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE
        images = model_config.multimodal_config.media_io_kwargs.setdefault("image", {})
        images.setdefault("image_mode", None)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise an `InputError` for a partial MAM or a degree of parallelism without support."""
        parts = vllm_config.parallel_config.tensor_parallel_size
        config = vllm_config.model_config.hf_config
        heads = config.num_key_value_heads
        if config.mam_modules is not None:
            raise InputError(
                f"mam_modules {config.mam_modules}: vLLM supports all modules of MAM, or none. "
                "`owl2 export MODEL OUTPUT --for authors` writes the shared weights for both "
                "modalities.",
                ErrorCode.UNSUPPORTED,
            )
        if heads % parts:
            raise InputError(
                f"tensor_parallel_size {parts} does not divide the model's {heads} key-value "
                "heads. Use a divisor, or several replicas behind a router.",
                ErrorCode.UNSUPPORTED,
            )
