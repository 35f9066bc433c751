"""mPLUG-Owl2 in vLLM: the plug-in that `vllm serve DIR` finds once this package is installed.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. What it
registers are names: the model itself is imported where vLLM makes one.
"""

from owl2.model.configuration import AUTHORS_ARCHITECTURE

TOKENIZER_MODE = "owl2"


def register() -> None:
    """Make the model, its tokenizer and its settings known to vLLM; more than once does no harm."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from owl2.vllm_plugin.config import Owl2Settings

    if AUTHORS_ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(
        AUTHORS_ARCHITECTURE, "owl2.vllm_plugin.model:Owl2ForConditionalGeneration"
    )
    TokenizerRegistry.register(TOKENIZER_MODE, "owl2.vllm_plugin.tokenizer", "Owl2PromptTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.hf", "HfRenderer")
    MODELS_CONFIG_MAP[AUTHORS_ARCHITECTURE] = Owl2Settings
