"""The classes of the siblings of mPLUG-Owl2 for the Auto classes of transformers.

transformers requires a model class for each configuration class. The code is that of mPLUG-Owl2,
which reads the parts of a model type from `owl2.model.registry`. Programs find out whether a class
generates from its direct base classes, so these include `GenerationMixin`.
"""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
)

from owl2.model.docowl_configuration import DocOwlConfig
from owl2.model.modeling import Owl2ForConditionalGeneration, Owl2Model
from owl2.model.owl2_1_configuration import Owl2_1Config


class DocOwlModel(Owl2Model):
    """DocOwl1.5 or DocOwl2 without `lm_head`."""

    config_class = DocOwlConfig


class DocOwlForConditionalGeneration(Owl2ForConditionalGeneration, GenerationMixin):
    """DocOwl1.5 or DocOwl2."""

    config_class = DocOwlConfig


class Owl2_1Model(Owl2Model):  # the version is in the name
    """mPLUG-Owl2.1 without `lm_head`."""

    config_class = Owl2_1Config


class Owl2_1ForConditionalGeneration(Owl2ForConditionalGeneration, GenerationMixin):
    """mPLUG-Owl2.1."""

    config_class = Owl2_1Config


for model, model_with_head in (
    (Owl2Model, Owl2ForConditionalGeneration),
    (DocOwlModel, DocOwlForConditionalGeneration),
    (Owl2_1Model, Owl2_1ForConditionalGeneration),
):
    AutoModel.register(model.config_class, model)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(model.config_class, model_with_head)
