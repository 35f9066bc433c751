"""owl2: mPLUG-Owl2, to chat with, fine-tune, pre-train, evaluate, serve and study.

Importing the package registers the model and its processor with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from owl2.engine.engine import Engine
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor

__version__ = "0.1.0"
__all__ = ["Engine", "Owl2Config", "Owl2ForConditionalGeneration", "Owl2Processor"]

AutoConfig.register(Owl2Config.model_type, Owl2Config)
AutoModelForCausalLM.register(Owl2Config, Owl2ForConditionalGeneration)
AutoModelForImageTextToText.register(Owl2Config, Owl2ForConditionalGeneration)
AutoProcessor.register(Owl2Config, Owl2Processor)
