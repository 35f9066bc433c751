"""ModelTesterMixin, GenerationTesterMixin and PipelineTesterMixin of transformers."""

import unittest
from functools import partial

import pytest
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.auto import modeling_auto

from owl2.model.configuration import Owl2Config
from owl2.model.docowl_configuration import DocOwlConfig
from owl2.model.family import (
    DocOwlForConditionalGeneration,
    DocOwlModel,
    Owl2_1ForConditionalGeneration,
    Owl2_1Model,
)
from owl2.model.modeling import Owl2ForConditionalGeneration, Owl2Model
from owl2.model.owl2_1_configuration import Owl2_1Config
from tests.peers.subjects import (
    IMAGE_TOKENS,
    SubjectTester,
    image_inputs,
    llava_config,
    owl2_config,
)

# Tests look up which classes have labels. `register` does not change these tables.
for model_class, model_with_head in (
    (Owl2Model, Owl2ForConditionalGeneration),
    (Owl2_1Model, Owl2_1ForConditionalGeneration),
    (DocOwlModel, DocOwlForConditionalGeneration),
):
    model_type = model_class.config_class.model_type
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = model_class.__name__
    for table in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        names[model_type] = model_with_head.__name__


class ModelSuite(ModelTesterMixin, GenerationTesterMixin):
    """All tests of a subject; subclasses name its classes."""

    _is_composite = True
    additional_model_inputs = ("pixel_values",)
    config_class = common_properties = make_tester = None

    def setUp(self):
        self.model_tester = self.make_tester()
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=self.common_properties,
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_mismatching_num_image_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            model(**inputs)
            with pytest.raises(ValueError, match=r"image"):
                model(**inputs | {"pixel_values": inputs["pixel_values"][-1:]})
            ids = inputs["input_ids"][:1].repeat(2, 1)
            with pytest.raises(ValueError, match=r"image"):
                model(input_ids=ids, **image_inputs(config, 1))
            model(input_ids=ids, **image_inputs(config, 2))

    @unittest.skip("Skipped for every vision-language model of transformers")
    def test_flash_attention_2_padding_matches_padding_free_with_position_ids(self):
        pass


class Owl2ModelTest(ModelSuite, unittest.TestCase):
    all_model_classes = (Owl2Model, Owl2ForConditionalGeneration)
    config_class = Owl2Config
    common_properties = (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "image_token_id",
    )
    settings: dict = {}
    attention = None  # the default, sdpa

    def make_tester(self):
        settings = dict(self.settings)
        if "resize" in self._testMethodName:  # these tests remove ids after the vocabulary
            settings["image_token_id"] = 0
        make = partial(owl2_config, **settings)
        return SubjectTester(self, make, IMAGE_TOKENS["owl2"], self.attention)


class Owl2NoMamModelTest(Owl2ModelTest):
    settings = {"use_mam": False}

    @unittest.skip("The keys of a model without MAM have the same names in files")
    def test_reverse_loading_mapping(self):
        pass


class Owl2EagerModelTest(Owl2ModelTest):
    attention = "eager"


class SiblingModelTest(ModelSuite):
    common_properties = Owl2ModelTest.common_properties
    attention = None
    make_tester = Owl2ModelTest.make_tester

    def test_reverse_loading_mapping(self):
        # Only names of the model with its head change, as in transformers' tests of LLaVA.
        super().test_reverse_loading_mapping(skip_base_model=True)


class Owl2_1ModelTest(SiblingModelTest, unittest.TestCase):  # the version is in the name
    all_model_classes = (Owl2_1Model, Owl2_1ForConditionalGeneration)
    config_class = Owl2_1Config
    settings = {"member": "mplug_owl2_1"}


class DocOwl2ModelTest(SiblingModelTest, unittest.TestCase):
    all_model_classes = (DocOwlModel, DocOwlForConditionalGeneration)
    config_class = DocOwlConfig
    settings = {"member": "mplug_docowl2"}
    additional_model_inputs = ("pixel_values", "image_grids")

    def setUp(self):
        cut = ("eager_matches_sdpa_inference", "prompt_lookup_and_assisted_decoding")
        if any(name in self._testMethodName for name in cut):
            self.skipTest("cuts pixel_values to one square for each row")
        super().setUp()

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        return config, inputs | image_inputs(config, batch_size)  # several squares for each row


class DocOwlModelTest(SiblingModelTest, unittest.TestCase):
    all_model_classes = (DocOwlModel, DocOwlForConditionalGeneration)
    config_class = DocOwlConfig
    settings = {"member": "mplug_docowl"}

    def setUp(self):
        # Its configuration has no compressor. That of DocOwl2, which has the same classes, has one.
        if "rope_scaling" in self._testMethodName:
            self.skipTest("reads all parts of the configuration")
        if "reverse_loading_mapping" in self._testMethodName:
            self.skipTest("expects weights with all names that the classes change")
        super().setUp()


class LlavaModelTest(ModelSuite, unittest.TestCase):
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)
    config_class = LlavaConfig
    common_properties = ("image_token_index", "vision_feature_layer", "image_seq_length")

    def make_tester(self):
        return SubjectTester(self, llava_config, IMAGE_TOKENS["llava"])
