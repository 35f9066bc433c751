"""Fields of a chat request that vLLM's server has and OpenAI's has not."""

import re

import openai
import pytest

from tests.serve.test_chat_completions import QUESTION, ask, color_uri, engine_outputs, user

__all__ = ["ask"]  # a fixture


@pytest.mark.parametrize("begin", ["a", "a red"])
def test_answer_that_continues_the_last_message(ask, tiny_engine, begin):
    messages = [*user(color_uri(), QUESTION), {"role": "assistant", "content": begin}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    text = ask(messages, extra_body=body).choices[0].message.content
    streamed = ask(messages, extra_body=body, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    start = tiny_engine.encode(messages[:1]).ids
    prompt = tiny_engine.encode(messages, continue_final_message=True)
    assert prompt.ids[: len(start)] == start
    assert tiny_engine.processor.decode(prompt.ids[len(start) :]) == begin
    assert engine_outputs(tiny_engine, prompt)[0].text == text
    with pytest.raises(openai.BadRequestError):
        ask(messages[:1], extra_body=body)


def test_every_chunk_has_usage(ask):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = ask(stream=True, stream_options=options)
    tokens = [chunk.usage.completion_tokens for chunk in chunks]
    assert tokens == sorted(tokens) and tokens[-1] == last.usage.completion_tokens
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}


def test_ids_in_place_of_the_texts_of_tokens(ask):
    options = {"logprobs": True, "top_logprobs": 2}
    reply = ask(**options, extra_body={"return_tokens_as_token_ids": True})
    tokens = reply.choices[0].logprobs.content
    assert all(re.fullmatch(r"token_id:\d+", token.token) for token in tokens)
    assert tokens[0].top_logprobs[0].token == tokens[0].token
    expected = ask(**options).choices[0].logprobs.content
    assert [token.bytes for token in tokens] == [token.bytes for token in expected]
