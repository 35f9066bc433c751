"""vLLM plug-in: `vllm serve DIR` finds the model once this package is installed.

vLLM calls `register` in each of its processes through the entry point `vllm.general_plugins`. It
registers names only; vLLM imports the model when it creates one. Start with `model`.
"""

from owl2.model.configuration import Owl2Config

TOKENIZER_MODE = "owl2"


def register() -> None:
    """Register the model, its tokenizer and its configuration with vLLM. Idempotent."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from owl2.vllm_plugin.config import VllmModelConfig

    if Owl2Config.authors_architecture in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(
        Owl2Config.authors_architecture, "owl2.vllm_plugin.model:VllmOwl2ForConditionalGeneration"
    )
    TokenizerRegistry.register(TOKENIZER_MODE, "owl2.vllm_plugin.tokenizer", "Owl2PromptTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.hf", "HfRenderer")
    MODELS_CONFIG_MAP[Owl2Config.authors_architecture] = VllmModelConfig
