"""The implementations of the benchmark compute the same values."""

import pytest
import torch

from owl2.bench.implementations import DecodeRunner, Implementations, LlamaDecodeRunner
from owl2.bench.measure import Roofline
from owl2.bench.presets import BenchModel
from owl2.bench.workload import BenchRequest, TrainingBatches
from owl2.engine.engine_core import EngineCore
from owl2.engine.sampling import SamplingParams
from owl2.model.variants import as_llama, as_no_mam, clone_sharing_weights


def close(left, right):
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_image_features_equal_the_model(model, baseline, workload):
    pixels = workload.pixels(3)
    with torch.no_grad():
        close(baseline.encode(pixels), model.get_image_features(pixels).pooler_output)


def test_logits_equal_the_model(model, baseline, workload):
    ids, pixels = workload.prompt(12, 5), workload.pixels()
    with torch.no_grad():
        close(baseline.forward(ids, pixels)[0], model(ids, pixels).logits)


def test_logits_of_a_padded_batch_equal_the_model(model, baseline, workload):
    batch = TrainingBatches.create(workload).padded
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    with torch.no_grad():
        ours = model(**inputs).logits
        theirs, _ = baseline.forward(**inputs)
    there = batch["attention_mask"].bool()
    close(theirs[there], ours[there])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_and_gradients_equal_the_model(model, baseline, workload, layout):
    batches = TrainingBatches.create(workload)

    def gradients(loss):
        loss.backward()
        actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach(), actual

    loss, expected = gradients(baseline.loss(**batches.padded))
    batch = getattr(batches, layout)
    ours, actual = gradients(model(**batch, use_cache=False, return_logits=False).loss)
    close(ours, loss)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        close(gradient, expected[name])


def test_greedy_answers_are_equal(model, baseline, workload):
    requests = [
        BenchRequest(workload.prompt(9, 4), workload.pixels(), 12),
        BenchRequest(workload.text_ids(5), None, 7),
    ]
    prompts = [(tuple(request.ids[0].tolist()), request.pixel_values) for request in requests]
    answers = baseline.generate([request[:2] for request in requests], [12, 7])
    assert [len(answer) for answer in answers] == [12, 7]
    assert len(set(answers[0])) > 1
    runner = EngineCore(model)
    actual = runner.generate(
        [runner.prepare(*prompt) for prompt in prompts], SamplingParams(), [12, 7], ()
    )
    assert actual == answers
    for (ids, pixels, _), answer in zip(requests, answers, strict=True):
        out = model.generate(
            ids, pixel_values=pixels, max_new_tokens=len(answer), do_sample=False, eos_token_id=-1
        )
        assert out[0, ids.shape[1] :].tolist() == answer


def test_decode_runners_decode_the_same_tokens(model, baseline, workload):
    prompt = workload.prompt(9, 4), workload.pixels()
    token, cache = baseline.prefill(*prompt)
    expected = baseline.decode(token, cache, 8)
    for steps in (
        DecodeRunner(model, prompt),
        DecodeRunner(model, prompt, rows=3),
        DecodeRunner(clone_sharing_weights(model), prompt),
    ):
        assert steps.decode(8) == expected
        assert steps.decode(8) == expected, "every call starts at the same position"


def test_variants_share_the_weights(model, workload):
    text_ids = workload.text_ids(9)
    plain, llama = as_no_mam(model), as_llama(model)
    with torch.no_grad():
        logits = model(text_ids).logits
        close(plain(text_ids).logits, logits)
        close(llama(text_ids).logits, logits)
    ours = {tensor.data_ptr() for tensor in model.parameters()}
    for variant in (plain, llama, clone_sharing_weights(model)):
        assert {tensor.data_ptr() for tensor in variant.parameters()} <= ours
    steps = LlamaDecodeRunner(llama, text_ids, rows=2)
    expected = DecodeRunner(model, (text_ids, None)).decode(6)
    assert steps.decode(6) == expected
    assert steps.decode(6) == expected, "every call starts at the same position"


def test_a_model_without_mam_uses_the_text_weights_for_images(model, workload):
    ids, pixels = workload.prompt(9, 4), workload.pixels()
    with torch.no_grad():
        same = torch.equal(as_no_mam(model)(ids, pixels).logits, model(ids, pixels).logits)
    assert same is not model.config.use_mam


def test_quantization_does_not_change_the_original_model():
    on = Implementations(
        BenchModel(size="tiny", device="cpu", dtype="float32"), Roofline(1.0, 1.0, 1.0)
    )
    text_ids = on.workload.text_ids(9)
    with torch.no_grad():
        before = on.model(text_ids).logits
        rounded = on.int8(text_ids).logits
        assert torch.equal(on.model(text_ids).logits, before)
    assert 0 < (rounded - before).abs().max() < 0.1 * before.abs().max()
