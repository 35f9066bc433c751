"""The textbook computes what the model computes, or the bench would compare different things."""

import pytest
import torch

from owl2.bench.implementations import LlamaSteps, Steps, Subjects
from owl2.bench.presets import Origin
from owl2.bench.roofline import Limits
from owl2.bench.workload import Batches, Request
from owl2.engine.engine_core import EngineCore
from owl2.engine.sampling import SamplingParams
from owl2.model.variants import as_llama, as_no_mam, clone_sharing_weights


def close(left, right):
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_images(model, textbook, workload):
    pixels = workload.pixels(3)
    with torch.no_grad():
        close(textbook.encode(pixels), model.get_image_features(pixels).pooler_output)


def test_logits_with_images(model, textbook, workload):
    ids, pixels = workload.prompt(12, 5), workload.pixels()
    with torch.no_grad():
        close(textbook.forward(ids, pixels)[0], model(ids, pixels).logits)


def test_logits_of_a_padded_batch(model, textbook, workload):
    batch = Batches.of(workload).padded
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    with torch.no_grad():
        ours = model(**inputs).logits
        theirs, _ = textbook.forward(**inputs)
    there = batch["attention_mask"].bool()
    close(theirs[there], ours[there])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_and_gradients(model, textbook, workload, layout):
    batches = Batches.of(workload)

    def gradients(loss):
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach(), found

    loss, expected = gradients(textbook.loss(**batches.padded))
    batch = getattr(batches, layout)
    ours, found = gradients(model(**batch, use_cache=False, return_logits=False).loss)
    close(ours, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name])


def test_greedy_tokens(model, textbook, workload):
    requests = [
        Request(workload.prompt(9, 4), workload.pixels(), 12),
        Request(workload.words(5), None, 7),
    ]
    prompts = [(tuple(request.ids[0].tolist()), request.pixel_values) for request in requests]
    answers = textbook.generate([request[:2] for request in requests], [12, 7])
    assert [len(answer) for answer in answers] == [12, 7]
    assert len(set(answers[0])) > 1
    runner = EngineCore(model)
    found = runner.generate(
        [runner.prepare(*prompt) for prompt in prompts], SamplingParams(), [12, 7], ()
    )
    assert found == answers
    for (ids, pixels, _), answer in zip(requests, answers, strict=True):
        out = model.generate(
            ids, pixel_values=pixels, max_new_tokens=len(answer), do_sample=False, eos_token_id=-1
        )
        assert out[0, ids.shape[1] :].tolist() == answer


def test_steps_of_all_decode_the_same(model, textbook, workload):
    prompt = workload.prompt(9, 4), workload.pixels()
    token, cache = textbook.prefill(*prompt)
    expected = textbook.decode(token, cache, 8)
    for steps in (
        Steps(model, prompt),
        Steps(model, prompt, rows=3),
        Steps(clone_sharing_weights(model), prompt),
    ):
        assert steps.decode(8) == expected
        assert steps.decode(8) == expected, "each time from the start"


def test_relatives_share_the_weights(model, workload):
    words = workload.words(9)
    plain, llama = as_no_mam(model), as_llama(model)
    with torch.no_grad():
        logits = model(words).logits
        close(plain(words).logits, logits)
        close(llama(words).logits, logits)
    ours = {tensor.data_ptr() for tensor in model.parameters()}
    for relative in (plain, llama, clone_sharing_weights(model)):
        assert {tensor.data_ptr() for tensor in relative.parameters()} <= ours
    steps = LlamaSteps(llama, words, rows=2)
    expected = Steps(model, (words, None)).decode(6)
    assert steps.decode(6) == expected
    assert steps.decode(6) == expected, "each time from the start"


def test_a_model_without_mam_has_one_way(model, workload):
    ids, pixels = workload.prompt(9, 4), workload.pixels()
    with torch.no_grad():
        same = torch.equal(as_no_mam(model)(ids, pixels).logits, model(ids, pixels).logits)
    assert same is not model.config.use_mam


def test_eight_bits_leave_the_model_as_it_is():
    on = Subjects(Origin(size="tiny", device="cpu", dtype="float32"), Limits(1.0, 1.0, 1.0))
    words = on.workload.words(9)
    with torch.no_grad():
        before = on.model(words).logits
        rounded = on.eight_bits(words).logits
        assert torch.equal(on.model(words).logits, before)
    assert 0 < (rounded - before).abs().max() < 0.1 * before.abs().max()
