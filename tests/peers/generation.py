"""Replaces modules that the sdist of transformers imports and does not contain.

`GenerationTesterMixin` has the checks of `generate` that matter for models with images; the classes
of transformers' exporters are empty here.
"""

import copy
from pathlib import Path

import torch

config_common_kwargs: dict = {}  # not read for configurations with nested ones


def url_to_local_path(url):
    """An image in the repository instead of each file on the hub."""
    return (
        str(Path(__file__).parents[2] / "docs" / "images" / "web.png")
        if url.endswith("png")
        else url
    )


class ExportTesterMixin:
    """The tests of torch.export and ONNX require a checkout of transformers."""


class GenerationTesterMixin:
    """Tests of `generate` for every class in `all_generative_model_classes`."""

    all_generative_model_classes = ()

    def _models(self):
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            yield model_class(config).eval(), inputs

    def _generate(self, model, inputs, **options):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | options
        return model.generate(**copy.copy(inputs), **options)

    def test_greedy_generate(self):
        for model, inputs in self._models():
            output = self._generate(model, inputs)
            assert output.shape[1] == inputs["input_ids"].shape[1] + 5

    def test_sample_and_beams(self):
        for model, inputs in self._models():
            batch = len(inputs["input_ids"])
            for options in ({"do_sample": True}, {"num_beams": 2}):
                output = self._generate(model, inputs, num_return_sequences=2, **options)
                assert len(output) == 2 * batch

    def test_generate_without_cache(self):
        for model, inputs in self._models():
            with_cache = self._generate(model, inputs)
            assert torch.equal(with_cache, self._generate(model, inputs, use_cache=False))

    def test_generate_with_static_cache(self):
        for model, inputs in self._models():
            dynamic = self._generate(model, inputs)
            assert torch.equal(
                dynamic, self._generate(model, inputs, cache_implementation="static")
            )

    def test_generate_with_offloaded_and_quantized_names(self):
        for model, inputs in self._models():
            output = self._generate(model, inputs, return_dict_in_generate=True, output_logits=True)
            assert len(output.logits) == 5
            assert output.past_key_values is not None

    def test_generate_continues_from_cache(self):
        for model, inputs in self._models():
            model.generation_config.eos_token_id = None
            complete = self._generate(model, inputs)
            first = self._generate(
                model, inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True
            )
            mask = torch.ones_like(first.sequences)
            output = model.generate(
                input_ids=first.sequences,
                attention_mask=mask,
                past_key_values=first.past_key_values,
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
            )
            assert torch.equal(output, complete)

    def test_left_padding(self):
        for model, inputs in self._models():
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            pad = ids.new_full((len(ids), 3), model.config.get_text_config().pad_token_id or 0)
            padded = inputs | {
                "input_ids": torch.cat([pad, ids], 1),
                "attention_mask": torch.cat([torch.zeros_like(pad), mask], 1),
            }
            expected = self._generate(model, inputs)[:, ids.shape[1] :]
            assert torch.equal(self._generate(model, padded)[:, ids.shape[1] + 3 :], expected)

    def test_prompt_lookup_and_assisted_decoding(self):
        for model, inputs in self._models():
            one = {name: value[:1] for name, value in inputs.items()}
            expected = self._generate(model, one)
            assert torch.equal(self._generate(model, one, prompt_lookup_num_tokens=2), expected)
            assert torch.equal(self._generate(model, one, assistant_model=model), expected)
