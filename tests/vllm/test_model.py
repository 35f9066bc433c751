"""vLLM's greedy tokens are the Engine's, in float32: alone, together, cut up and remembered."""

import pytest

from tests.vllm.conftest import (
    QUERIES,
    ask,
    conversations,
    engine_tokens,
    make_checkpoint,
    picture,
    running,
    vllm_tokens,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def expected(engine):
    return [engine_tokens(engine, messages) for messages in conversations()]


def test_each_alone(llm, expected):
    # First of all tests, so that nothing is remembered yet.
    assert [vllm_tokens(llm, [messages])[0] for messages in conversations()] == expected
    assert len({tuple(tokens) for tokens in expected}) == 16  # so the pictures are seen


def test_sixteen_together_with_their_prefixes_remembered(llm, expected):
    assert vllm_tokens(llm, conversations()) == expected


def test_sixteen_together_with_nothing_remembered(llm, expected):
    assert llm.reset_prefix_cache()
    assert vllm_tokens(llm, conversations()) == expected


def test_a_remembered_prompt_with_another_picture_is_another_prompt(llm, engine):
    question = "what is this? is it red or blue?"
    for number in (1, 2, 1):
        messages = ask(question, picture(number))
        assert vllm_tokens(llm, [messages]) == [engine_tokens(engine, messages)]


def test_another_question_about_a_remembered_picture(llm, engine):
    first, second = (ask(text, picture(3), picture(4)) for text in ("is it red?", "is it blue?"))
    vllm_tokens(llm, [first])
    assert vllm_tokens(llm, [second]) == [engine_tokens(engine, second)]


@pytest.mark.parametrize("extra", range(3))
def test_one_visual_token_alone_in_a_step(llm, engine, extra):
    """A prompt that ends in a picture, all but its last tokens remembered: they look like decoding
    to vLLM, but are visual."""
    import torch
    from vllm import SamplingParams

    processor = engine.processor
    start = processor(text="USER: ")["input_ids"][0]
    words = (64 + 1 + extra) - len(start) - (QUERIES + 1)
    text_ids = start + [70 + number for number in range(words)]
    prompt = {
        "prompt_token_ids": [*text_ids, processor.image_token_id],
        "multi_modal_data": {"image": picture(5)},
    }
    ids = torch.tensor([text_ids + [processor.image_token_id] * (QUERIES + 1)])
    pixels = processor.image_processor([picture(5)])["pixel_values"]
    made = engine.model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=8, do_sample=False
    )
    sampling = SamplingParams(temperature=0, max_tokens=8)
    for remembered in (0, 64):
        [output] = llm.generate([prompt], sampling, use_tqdm=False)
        assert output.num_cached_tokens == remembered
        assert list(output.outputs[0].token_ids) == made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("text", "pictures"),
    [("<|image|> what?", 0), ("what? <|image|>", 1)],
)
def test_a_placeholder_without_a_picture_is_refused_and_the_next_is_answered(
    llm, engine, text, pictures
):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"out of vocabulary|placeholder"):
        vllm_tokens(llm, [ask(text, *map(picture, range(pictures)))])
    good = ask("what is this?", picture(0))
    assert vllm_tokens(llm, [good]) == [engine_tokens(engine, good)]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_mam": False},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_other_decoders(tmp_path, settings):
    from owl2.inference.engine import Engine

    directory = make_checkpoint(tmp_path, **settings)
    engine = Engine.from_pretrained(directory, device="cpu", dtype="float32", reuse=False)
    expected = [engine_tokens(engine, messages) for messages in conversations()]
    with running(directory) as llm:
        assert vllm_tokens(llm, conversations()) == expected


def test_two_processes_share_the_decoder(checkpoint, expected):
    with running(checkpoint, tensor_parallel_size=2) as llm:
        assert vllm_tokens(llm, conversations()) == expected
