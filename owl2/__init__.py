"""owl2: mPLUG-Owl2, to chat with, fine-tune, pre-train, evaluate, serve and study.

Importing the package registers the model with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from owl2.model.configuration import Owl2Config
from owl2.model.owl2 import Owl2ForConditionalGeneration

__version__ = "0.1.0"
__all__ = ["Owl2Config", "Owl2ForConditionalGeneration"]

AutoConfig.register(Owl2Config.model_type, Owl2Config)
AutoModelForCausalLM.register(Owl2Config, Owl2ForConditionalGeneration)
AutoModelForImageTextToText.register(Owl2Config, Owl2ForConditionalGeneration)
