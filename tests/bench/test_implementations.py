"""The implementations of the benchmark compute the same values."""

import pytest
import torch

from owl2.bench.implementations import (
    DecodeRunner,
    Implementations,
    TransformersDecodeRunner,
    generate,
)
from owl2.bench.measure import Roofline
from owl2.bench.presets import BenchModel
from owl2.engine.engine_core import EngineCore
from owl2.model.variants import as_llama, as_no_mam, clone_sharing_weights


def close(left, right):
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_image_features_of_the_baseline_equal_the_model(model, baseline, workload):
    pixels = workload.pixels(3)
    with torch.no_grad():
        close(
            baseline.get_image_features(pixels).pooler_output,
            model.get_image_features(pixels).pooler_output,
        )


def test_logits_of_the_baseline_equal_the_model(model, baseline, workload):
    ids, pixels, _ = workload.request(12, 5)
    with torch.no_grad():
        close(baseline(ids, pixels).logits, model(ids, pixels).logits)


def test_logits_of_a_padded_batch_equal_the_model(model, baseline, workload):
    batch = workload.training_batches()["padded"]
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        close(baseline(**inputs).logits[is_token], model(**inputs).logits[is_token])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_and_gradients_of_the_baseline_equal_the_model(model, baseline, workload, layout):
    batches = workload.training_batches()

    def gradients(model, loss):
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected_loss = baseline(**batches["padded"]).loss
    loss = model(**batches[layout], use_cache=False, return_logits=False).loss
    close(loss, expected_loss)
    expected, actual = gradients(baseline, expected_loss), gradients(model, loss)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        close(gradient, expected[name])


def test_greedy_answers_are_equal(model, baseline, workload):
    requests = [workload.request(9, 4, limit=12), workload.request(5, has_image=False, limit=7)]
    answers = generate(EngineCore(model), requests)
    assert [len(answer) for answer in answers] == [12, 7]
    assert len(set(answers[0])) > 1
    for request, answer in zip(requests, answers, strict=True):
        ids, pixels, limit = request
        runner = TransformersDecodeRunner(baseline, request)
        assert runner.decode(limit - 1) == answer[1:]
        out = model.generate(
            ids, pixel_values=pixels, max_new_tokens=limit, do_sample=False, eos_token_id=-1
        )
        assert out[0, ids.shape[1] :].tolist() == answer


def test_decode_runners_decode_the_same_tokens(model, baseline, workload):
    request = workload.request(9, 4)
    text = workload.request(9, has_image=False)
    for runners in (
        [
            TransformersDecodeRunner(baseline, request),
            DecodeRunner(model, request),
            DecodeRunner(model, request, rows=3),
            DecodeRunner(clone_sharing_weights(model), request),
        ],
        [DecodeRunner(model, text), TransformersDecodeRunner(as_llama(model), text, rows=2)],
    ):
        expected = runners[0].decode(8)
        for runner in runners:
            assert runner.decode(8) == expected
            assert runner.decode(8) == expected, "every call starts at the same position"


def test_variants_share_the_weights(model, baseline, workload):
    text_ids = workload.text_ids(9)
    no_mam, llama = as_no_mam(model), as_llama(model)
    with torch.no_grad():
        logits = model(text_ids).logits
        close(no_mam(text_ids).logits, logits)
        close(llama(text_ids).logits, logits)
    addresses = {tensor.data_ptr() for tensor in model.parameters()}
    for variant in (no_mam, llama, baseline):
        assert {tensor.data_ptr() for tensor in variant.parameters()} <= addresses


def test_a_model_without_mam_uses_the_text_weights_for_images(model, workload):
    ids, pixels, _ = workload.request(9, 4)
    with torch.no_grad():
        same = torch.equal(as_no_mam(model)(ids, pixels).logits, model(ids, pixels).logits)
    assert same is not model.config.use_mam


def test_quantization_does_not_change_the_original_model():
    on = Implementations(BenchModel(size="tiny", device="cpu", dtype="float32"), Roofline(1.0, 1.0))
    text_ids = on.workload.text_ids(9)
    with torch.no_grad():
        before = on.model(text_ids).logits
        rounded = on.int8(text_ids).logits
        assert torch.equal(on.model(text_ids).logits, before)
    assert 0 < (rounded - before).abs().max() < 0.1 * before.abs().max()
