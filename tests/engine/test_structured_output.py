"""Structured output: answers match a schema, choices, a regular expression or a grammar."""

import json
import re
from queue import SimpleQueue

import pytest
import torch
from jsonschema import Draft202012Validator

from owl2.engine.engine import Engine
from owl2.engine.sampler import sample
from owl2.engine.sampling_params import SamplingParams, StructuredOutputsParams
from owl2.engine.structured_output import FORMATS, GrammarCompiler, llguidance_grammar
from owl2.errors import ErrorCode, InputError
from tests.engine.conftest import SCHEMA, ask, caching_engine
from tests.errors import raises_input_error

TOKENS = 80
COLORS = ["red", "green", "red circle", "蓝"]


def is_valid(text, schema=SCHEMA):
    return Draft202012Validator(schema).is_valid(json.loads(text))


CASES = {
    "json": ({"json": SCHEMA, "whitespace_pattern": " "}, is_valid),
    "json text": ({"json": json.dumps(SCHEMA), "whitespace_pattern": r"\n"}, is_valid),
    "compact json": (
        {"json": SCHEMA, "disable_any_whitespace": True},
        lambda text: is_valid(text) and not set(text.replace("dark ", "")) & set(" \n"),
    ),
    "choice": ({"choice": COLORS}, COLORS.__contains__),
    "regex": ({"regex": r"^(ab|c/)\d{2,4}$"}, re.compile(r"(ab|c/)[0-9]{2,4}").fullmatch),
    "Lark": (
        {"grammar": '?start: sum\nsum: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[1-9]/'},
        re.compile(r"[1-9](\+[1-9]){1,3}").fullmatch,
    ),
    "GBNF": ({"grammar": 'root ::= x x\nx ::= "yes" | "no"'}, re.compile("(yes|no){2}").fullmatch),
}
SAMPLINGS = {
    "greedy": {},
    "hot": {"temperature": 3.0, "seed": 1},
    "top_k, top_p, min_p": {"top_k": 3, "top_p": 0.5, "min_p": 0.2, "seed": 2},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "min_new_tokens": 50},
    "forced end": {"forced_eos_token_id": 2, "remove_invalid_values": True, "typical_p": 0.3},
    "bias": {"sequence_bias": [[[2], 100.0]], "exponential_decay_length_penalty": (1, 9.0)},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(("constraint", "matches"), CASES.values(), ids=CASES)
def test_answers_match(shared_engine, conversations, constraint, matches, sampling):
    outputs = shared_engine.batch_outputs(
        conversations[:4], structured_outputs=constraint, max_new_tokens=TOKENS, **sampling
    )
    for output in outputs:
        assert output.finish_reason == "stop"
        assert matches(output.text), output.text


def test_any_json_object(shared_engine, conversations):
    options = {"structured_outputs": {"json_object": True}, "temperature": 2.0, "seed": 0}
    outputs = shared_engine.batch_outputs(conversations * 3, max_new_tokens=TOKENS, **options)
    values = [json.loads(one.text) for one in outputs if one.finish_reason == "stop"]
    assert values
    assert all(isinstance(value, dict) for value in values)


@pytest.mark.parametrize("name", ["password", "int32", "json-string", "path"])
def test_formats_without_a_rule_are_annotations(shared_engine, name):
    """pydantic and other libraries write them."""
    properties = {"format": {"type": "string", "format": name}, "b": {"const": {"format": name}}}
    schema = {"type": "object", "properties": properties, "required": ["b"]}
    params = StructuredOutputsParams(json=schema)
    assert llguidance_grammar(params).count(name) == 1  # that of `const`
    assert schema["properties"]["format"]["format"] == name
    shared_engine.sampling_params(structured_outputs=params)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_known_formats_are_enforced(shared_engine, name):
    params = StructuredOutputsParams(json={"type": "string", "format": name})
    assert name in llguidance_grammar(params)
    shared_engine.sampling_params(structured_outputs=params)


def test_valid_answers_do_not_change(shared_engine, conversations):
    """A constraint that the free answer satisfies does not change it."""
    anything = {"regex": r"(?s:.*)"}
    options = {"max_new_tokens": 12, "suppress_tokens": [0, 1, *range(3, 259)]}  # no bytes
    free = shared_engine.batch(conversations, **options)
    assert len(set(free)) > 6
    assert shared_engine.batch(conversations, structured_outputs=anything, **options) == free


def test_a_choice_is_the_most_probable_one(shared_engine, conversations):
    """For choices of one token, as long as their other tokenizations are excluded."""
    vocabulary = shared_engine.processor.tokenizer.get_vocab()
    choices = [token[1:] for token in vocabulary if re.fullmatch("▁[a-z]+", token)]
    wanted = {vocabulary[f"▁{choice}"] for choice in choices}
    assert len(wanted) > 3
    constraint = {"choice": choices}
    others = [id_ for id_ in range(2, len(vocabulary)) if id_ not in wanted]
    options = {"structured_outputs": constraint, "suppress_tokens": [*others, 2]}
    first = [one for one in conversations if not any(m["role"] == "assistant" for m in one)]
    for messages in first:
        answer = shared_engine.chat(messages, max_new_tokens=1, **options)
        scores = shared_engine.score(messages, choices, include_end=False)
        assert answer == choices[scores.index(max(scores))]


def test_rows_of_a_batch_have_their_own_constraints(
    shared_engine, conversations, gate, batch_sizes
):
    constraints = [None, {"choice": COLORS}, {"json": SCHEMA}, None, {"regex": "[ab]{20}"}, None]
    samplings = [{}, {}, {"temperature": 2.0, "seed": 3}, {"temperature": 1.0, "seed": 4}, {}, {}]
    cases = [
        (messages, {"structured_outputs": constraint, "max_new_tokens": 30} | sampling)
        for messages, constraint, sampling in zip(
            conversations, constraints, samplings, strict=False
        )
    ]
    gate.free_steps = 1_000_000
    alone = [shared_engine.chat(messages, **options) for messages, options in cases]
    gate.free_steps = 0
    queues = [SimpleQueue() for _ in cases]
    for queue, (messages, options) in zip(queues, cases, strict=True):
        prompt, params = shared_engine.encode(messages), shared_engine.sampling_params(**options)
        shared_engine.submit(prompt, params, queue.put)
    assert gate.reached.wait(20)
    batch_sizes.clear()
    gate.open()
    together = []
    for queue in queues:
        chunks = [queue.get(timeout=20)]
        while chunks[-1].finish_reason is None:
            chunks.append(queue.get(timeout=20))
        together.append("".join(chunk.text for chunk in chunks))
    assert together == alone
    assert max(batch_sizes) == len(cases)


def test_prefix_cache_streaming_and_several_answers(shared_engine, conversations):
    options = {"structured_outputs": CASES["json"][0], "max_new_tokens": TOKENS}
    sampled = options | {"temperature": 1.5, "seed": 7}
    engine = caching_engine(shared_engine)
    for messages in conversations[1:3] * 2:  # the second time with cached prefixes
        expected = shared_engine.chat(messages, **options)
        assert "".join(engine.stream(messages, **options)) == expected
    outputs = engine.complete(conversations[2], n=3, **sampled).outputs()
    alone = [
        shared_engine.chat(conversations[2], **sampled | {"seed": 7 + index}) for index in range(3)
    ]
    assert [output.text for output in outputs] == alone
    assert len(set(alone)) > 1


def test_models_on_several_devices(shared_engine, conversations, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("owl2.engine.hf_generate.is_on_one_device", lambda model: False)
        engine = Engine(shared_engine.model, shared_engine.processor)
    for constraint, _ in CASES.values():
        options = {"structured_outputs": constraint, "max_new_tokens": 30}
        expected = shared_engine.batch(conversations[1:4], **options)
        assert engine.batch(conversations[1:4], **options) == expected


def test_finish_reasons(shared_engine, conversations):
    def ask_for(constraint, **options):
        options = {"max_new_tokens": TOKENS} | options
        return shared_engine.batch_outputs(
            conversations[:1], structured_outputs=constraint, **options
        )[0]

    digits = ask_for({"regex": "[0-9]{20}"})
    assert (digits.finish_reason, len(digits.text)) == ("stop", 20)
    short = ask_for({"regex": "[0-9]{20}"}, max_new_tokens=7)
    assert (short.finish_reason, short.num_tokens) == ("length", 7)
    # The grammar ends the answer, although more tokens are requested.
    assert ask_for({"choice": ["red"]}, min_new_tokens=40).text == "red"
    # The answer may end after each letter.
    letters = ask_for({"regex": "[ab]{1,25}"}, min_new_tokens=15)
    assert len(letters.text) >= 15


def test_stop_strings_end_json(shared_engine, conversations):
    schema = {"json": {"const": {"a": "one two"}}}
    options = {"structured_outputs": schema, "max_new_tokens": TOKENS}
    assert json.loads(shared_engine.chat(conversations[0], **options)) == {"a": "one two"}
    [output] = shared_engine.batch_outputs(conversations[:1], stop=" two", **options)
    assert output.finish_reason == "stop"
    assert output.text.endswith('"one')


def test_options_that_exclude_every_allowed_token(shared_engine, conversations):
    vocabulary = range(3, len(shared_engine.processor.tokenizer) - 1)
    for options in (
        {"suppress_tokens": [*vocabulary]},
        {"bad_words_ids": [[id_] for id_ in vocabulary], "temperature": 1.0, "seed": 0},
    ):
        text = shared_engine.chat(
            conversations[0], structured_outputs={"choice": ["red"]}, max_new_tokens=9, **options
        )
        assert text == "red"


def test_log_probabilities_do_not_depend_on_the_constraint(shared_engine, conversations):
    def first(**options):
        completion = shared_engine.complete(conversations[0], top_logprobs=5, **options)
        return completion.outputs()[0].logprobs[0].top

    assert first(max_new_tokens=1) == first(structured_outputs={"choice": COLORS})


def test_masked_logits_may_not_be_finite():
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, float("nan"), 2.0], [1.0, 5.0, 2.0]])
    masks = [torch.tensor(one) for one in ([True, False, True], [True, False, True], [False] * 3)]
    params = [SamplingParams()] * 3
    before = logits.clone()
    assert sample(logits, params, [None] * 3, masks=masks) == [2, None, None]
    assert sample(logits, params, [None] * 3, masks=[None, None, masks[0]]) == [1, None, 2]
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("value", "code", "needle"),
    [
        ({}, ErrorCode.MISSING_VALUE, "json_object"),
        ({"json_object": False}, ErrorCode.MISSING_VALUE, "json_object"),
        ({"choice": ["a"], "regex": "a"}, ErrorCode.CONFLICT, "regex and choice"),
        ({"choice": []}, ErrorCode.INVALID_TYPE, "choice"),
        ({"choice": "red"}, ErrorCode.INVALID_TYPE, "choice"),
        ({"choice": ["a", 1]}, ErrorCode.INVALID_TYPE, "choice"),
        ({"choice": ["a", " "]}, ErrorCode.INVALID_TYPE, "choice"),
        ({"json": 5}, ErrorCode.INVALID_TYPE, "json"),
        ({"regex": 5}, ErrorCode.INVALID_TYPE, "regex"),
        ({"grammar": ["a"]}, ErrorCode.INVALID_TYPE, "grammar"),
        ({"json_object": 1}, ErrorCode.INVALID_TYPE, "json_object"),
        ({"structural_tag": "{}"}, ErrorCode.UNKNOWN_NAME, "structural_tag"),
        ("red", ErrorCode.INVALID_TYPE, "dictionary"),
    ],
)
def test_values_of_structured_outputs(shared_engine, value, code, needle):
    with raises_input_error(code, needle):
        shared_engine.sampling_params(structured_outputs=value)


def test_end_tokens_cannot_be_ignored(shared_engine):
    with raises_input_error(ErrorCode.INVALID_VALUE, "ignore_eos"):
        shared_engine.sampling_params(structured_outputs={"choice": ["a"]}, ignore_eos=True)


def test_the_error_names_the_extra(shared_engine, monkeypatch):
    monkeypatch.setattr("owl2.errors.find_spec", lambda name: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "llguidance", "[structured]"):
        shared_engine.chat(ask("what?"), structured_outputs={"choice": ["a"]})


def test_equal_constraints_are_compiled_once(shared_engine, conversations, monkeypatch):
    engine = Engine(shared_engine.model, shared_engine.processor)
    compiled = []
    original = GrammarCompiler._compile_text

    def count(self, text):
        compiled.append(text)
        return original(self, text)

    monkeypatch.setattr(GrammarCompiler, "_compile_text", count)
    engine = Engine(shared_engine.model, shared_engine.processor)
    for _ in range(2):
        engine.batch(conversations[:3], structured_outputs={"choice": ["a", "b"]})
    assert len(compiled) == 1


def test_an_answer_that_is_too_complex_does_not_affect_others(
    shared_engine, conversations, monkeypatch, gate
):
    structured = shared_engine.sampling_params(structured_outputs={"regex": "[ab]{50}"})
    free = shared_engine.sampling_params(max_new_tokens=5)
    prompt, queues = shared_engine.encode(conversations[0]), [SimpleQueue(), SimpleQueue()]
    for params, queue in zip((structured, free), queues, strict=True):
        shared_engine.submit(prompt, params, queue.put)
    assert gate.reached.wait(20)
    monkeypatch.setattr("owl2.engine.structured_output.MAX_SECONDS", 0.0)
    gate.open()
    results = []
    for queue in queues:
        results.append(queue.get(timeout=20))
        while getattr(results[-1], "finish_reason", "error") is None:
            results[-1] = queue.get(timeout=20)
    assert isinstance(results[0], InputError)
    assert results[0].code is ErrorCode.INVALID_FORMAT
    assert results[1].finish_reason == "length"


def test_chat_command(run_cli, tiny_checkpoint, tmp_path):
    options = ["--model", tiny_checkpoint, "--device", "cpu", "--dtype", "float32", "what is this?"]
    result = run_cli("chat", *options, "--choice", "red", "--choice", "dark blue")
    assert (result.exit_code, result.stdout.strip() in ("red", "dark blue")) == (0, True)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), "utf-8")
    result = run_cli("chat", *options, "--json-schema", path)
    assert (result.exit_code, is_valid(result.stdout)) == (0, True)
    path.write_text('{"not": {}}', "utf-8")
    result = run_cli("chat", *options, "--json-schema", path)
    assert (result.exit_code, "not" in result.stderr) == (2, True)
    result = run_cli("chat", *options, "--json-schema", tmp_path / "missing.json")
    assert (result.exit_code, "missing.json" in result.stderr) == (2, True)
