"""Golden answers of the siblings, through the engine and the server."""

import pytest
import torch

from owl2.engine.engine import Engine
from owl2.engine.engine_core import EngineCore
from owl2.engine.sampling_params import SamplingParams
from owl2.errors import ErrorCode
from tests.errors import raises_input_error
from tests.family import load_model, load_processor, make_cases

CASES = make_cases()
GREEDY = SamplingParams()


def golden_tokens(case):
    found = case.expected.get("new_tokens", torch.tensor([case.text.get("new_tokens", [])]))
    return found[0].tolist()


@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("sibling", ["docowl1_5", "docowl2", "mplug_owl2_1"])
def test_golden_tokens_in_one_batch(sibling, caches):
    """Prompts of all lengths run together, and a second time with cached prefixes."""
    core = EngineCore(load_model(sibling), enable_prefix_caching=caches, min_prefix_tokens=2)
    cases = [case for case in CASES if case.sibling == sibling]
    prompts = [case.processor().encode(case.messages()) for case in cases]
    for _ in range(2):
        answers = core.generate(prompts, GREEDY, [24] * len(prompts), ())
        assert answers == [golden_tokens(case) for case in cases]


@pytest.mark.parametrize(
    ("sibling", "expected"), [("docowl1_5", True), ("docowl2", True), ("mplug_owl2_1", False)]
)
def test_images_of_documents_keep_their_places(sibling, expected):
    assert load_processor(sibling).interleave_images is expected


def test_prompts_with_other_rotary_embeddings_share_no_prefix():
    """The keys of a prefix depend on the length of its prompt."""
    model, processor = load_model("mplug_owl2_1"), load_processor("mplug_owl2_1")
    length = model.config.seq_length
    ids = processor.prompt_ids("USER: Describe the image. " * 6)
    short, long = ids[: length - 2], ids[: length + 8]
    assert (model.config.ntk_alpha(len(short)), model.config.ntk_alpha(len(long))) == (1, 3)
    expected = EngineCore(model, enable_prefix_caching=False)
    cached = EngineCore(model, min_prefix_tokens=2)
    for prompt in (short, long, short):
        # The answer to the short prompt becomes longer than the sequences of training.
        arguments = GREEDY, [8], ()
        one, other = (
            core.generate([core.prepare(prompt)], *arguments) for core in (expected, cached)
        )
        assert one == other


def test_next_token_logits_of_prompts_with_other_rotary_embeddings():
    model, processor = load_model("mplug_owl2_1"), load_processor("mplug_owl2_1")
    engine, length = Engine(model, processor), model.config.seq_length
    ids = processor.prompt_ids("USER: Describe the image. " * 6)
    prompts = [engine.core.prepare(ids[:count]) for count in (length - 2, length + 8, length + 9)]
    logits = engine.next_token_logits(prompts, range(40))
    alone = torch.cat([engine.next_token_logits([prompt], range(40)) for prompt in prompts])
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([one.ids])).logits[0, -1, :40] for one in prompts]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, torch.stack(expected), rtol=0, atol=1e-4)


def test_a_filled_cache_needs_the_length_of_the_prompt():
    model = load_model("mplug_owl2_1")
    ids = torch.arange(3, 3 + model.config.seq_length)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with raises_input_error(ErrorCode.MISSING_VALUE, "ntk_alphas", ids.shape[1] + 1):
            model(input_ids=ids[:, :1], past_key_values=cache)
        output = model(input_ids=ids[:, :1], past_key_values=cache, ntk_alphas=torch.ones(1))
    assert output.logits.isfinite().all()


def test_crops_without_grids_are_refused():
    model = load_model("docowl2")
    pixels = torch.zeros(3, 3, 56, 56)
    for grids in (None, torch.tensor([[1, 1]])):
        with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, 3):
            model.get_image_features(pixels, grids)


def test_several_answers_to_pages_of_different_sizes():
    """Beams and returned sequences repeat the crops of each prompt."""
    model = load_model("docowl2")
    inputs = next(case for case in CASES if case.id == "docowl2-three").inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = model.generate(**inputs, **options)
    several = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)
    assert several.shape[0] == 2
    with torch.no_grad():
        scores = [
            model(**inputs | {"input_ids": ids}).logits.log_softmax(-1)
            for ids in (alone, several[:1])
        ]
    start = inputs["input_ids"].shape[1]
    greedy, best = (
        score[0, start - 1 : -1].gather(-1, ids[0, start:, None]).sum()
        for score, ids in zip(scores, (alone, several[:1]), strict=True)
    )
    assert best >= greedy - 1e-4
