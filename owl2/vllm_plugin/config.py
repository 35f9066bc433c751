"""What vLLM has to be told about a checkpoint before anything of it is loaded."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from owl2.errors import InputError
from owl2.vllm_plugin import TOKENIZER_MODE


class Owl2Settings(VerifyAndUpdateConfig):
    """vLLM calls these two for a checkpoint of ours, with its own configurations."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Ids and pixels as the model was trained with.

        That is: its own tokenizer instead of a converted one; and images as they are in their
        files, instead of in vLLM's RGB: `processing.ImageParser` knows what is transparent or
        has 16 bits.
        """
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE
        images = model_config.multimodal_config.media_io_kwargs.setdefault("image", {})
        images.setdefault("image_mode", None)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise an InputError for a way of sharing out the model that it does not have."""
        parts = vllm_config.parallel_config.tensor_parallel_size
        heads = vllm_config.model_config.hf_config.num_key_value_heads
        if heads % parts:
            raise InputError(
                f"tensor_parallel_size {parts} does not divide the model's {heads} key-value "
                "heads: take a divisor, or several copies of the model behind a router"
            )
