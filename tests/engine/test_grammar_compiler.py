"""Grammars: accepted texts, tokenizers of other models, invalid and hostile constraints."""

import json
import random
import time

import pytest

from owl2.engine.detokenizer import token_texts
from owl2.engine.sampling_params import StructuredOutputsParams
from owl2.engine.structured_output import GrammarCompiler
from owl2.errors import ErrorCode, InputError
from owl2.processing.tokenizer import encode
from tests.engine.conftest import SCHEMA
from tests.errors import raises_input_error
from tests.processing.conftest import byte_level, llama, llama_file  # noqa: F401  # fixtures


@pytest.fixture
def compiler(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    return GrammarCompiler(token_texts(tokenizer), len(tokenizer), [2])


def test_special_tokens_are_excluded(compiler, shared_engine):
    special = shared_engine.processor.tokenizer.all_special_ids
    params = StructuredOutputsParams(regex="(?s:.*)")
    mask = compiler.matcher(params).allowed_tokens(len(shared_engine.processor.tokenizer) + 5)
    assert [id_ for id_ in special if mask[id_]] == [2]  # the answer may be empty
    assert mask[3:259].sum() > 128  # bytes that begin a character
    assert not mask[-5:].any()


def accepts(compiler, tokenizer, params, text):
    """Whether a text is a complete answer, as the tokens of its bytes."""
    matcher = compiler.matcher(params)
    for token in tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()]):
        if not matcher.allowed_tokens(len(tokenizer))[token]:
            return False
        matcher.accept(token)
    return matcher.is_stopped or bool(matcher.allowed_tokens(len(tokenizer))[2])


@pytest.mark.parametrize(
    ("constraint", "accepted", "rejected"),
    [
        ({"json": {}}, ["1", "[]", '{"a": null}', ' "x"'], ["", "  1", "x", "1 "]),
        ({"json": {"type": "array"}}, ["[1,2]", "[1, 2]", "[\n    1,\n    2\n]"], ["[1,  2]"]),
        ({"json": {"type": "array"}, "whitespace_pattern": " *"}, ["[1,   2]"], ["[1,\n2]"]),
        ({"json": {"type": "array"}, "disable_any_whitespace": True}, ["[1,2]"], ["[1, 2]"]),
        ({"json_object": True}, ["{}", '{"a":{}}'], ["[]", "1"]),
        ({"choice": ["</s>", "<|image|>", '"', "\\", "a\nb"]}, ["</s>", '"', "\\", "a\nb"], ["a"]),
        ({"choice": ["red", "red circle"]}, ["red", " red circle"], ["red ", "circle"]),
        ({"regex": r"^\d+$"}, ["12"], ["", "१२"]),
        ({"regex": r"(?i)yes|no"}, ["YES", "no"], ["maybe"]),
        ({"grammar": "start: A | B\nA: /a+/\nB: /b/"}, ["aaa", "b"], ["ab"]),
        ({"grammar": 'root ::= item+\nitem ::= "- " [a-z]+ "\\n"'}, ["- a\n- bc\n"], ["- a"]),
    ],
)
def test_accepted_texts(compiler, shared_engine, constraint, accepted, rejected):
    params = StructuredOutputsParams(**constraint)
    tokenizer = shared_engine.processor.tokenizer
    assert [text for text in accepted if not accepts(compiler, tokenizer, params, text)] == []
    assert [text for text in rejected if accepts(compiler, tokenizer, params, text)] == []


@pytest.mark.parametrize("name", ["llama", "byte_level"])
def test_tokenizers_of_other_models(name, request):
    """32,000 tokens of SentencePiece with byte fallback, and byte-level BPE."""
    tokenizer = request.getfixturevalue(name)
    end = tokenizer.eos_token_id
    compiler = GrammarCompiler(token_texts(tokenizer), len(tokenizer), [end])
    params = StructuredOutputsParams(json=SCHEMA)
    for color in SCHEMA["properties"]["color"]["enum"]:
        matcher = compiler.matcher(params)
        text = json.dumps({"color": color, "count": 7, "tags": ["x"]}, ensure_ascii=False)
        for token in encode(tokenizer, text):
            assert matcher.allowed_tokens(len(tokenizer))[token], (text, token)
            matcher.accept(token)
        assert matcher.is_stopped
        assert matcher.allowed_tokens(len(tokenizer)).nonzero().tolist() == [[end]]


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


INVALID = {
    "type": {"json": {"type": "nonsense"}},
    "not JSON": {"json": "{"},
    "list": {"json": "[]"},
    "reference": {"json": {"$ref": "#/nowhere"}},
    "remote reference": {"json": {"$ref": "http://127.0.0.1/schema"}},
    "keyword": {"json": {"not": {"type": "string"}}},
    "pattern": {"json": {"type": "string", "pattern": "("}},
    "unsatisfiable": {"json": {"enum": []}},
    "NaN": {"json": {"const": float("nan")}},
    "not serializable": {"json": {"const": {1, 2}}},
    "look-around": {"regex": "a(?=b)"},
    "parenthesis": {"regex": "(a"},
    "Lark": {"grammar": "start: missing"},
    "GBNF": {"grammar": 'root ::= "a" | ('},
    "image token": {"grammar": "start: <|image|>"},
    "inline schema": {"grammar": 'start: %json {"type": "object"}'},
    "white space": {"json_object": True, "whitespace_pattern": "("},
}


HOSTILE = {
    "large": {"json": {"const": "a" * 70_000}},
    "large text": {"json": "[" * 70_000},
    "many choices": {"choice": [str(number) for number in range(20_000)]},
    "deep": {"json": nested(400)},
    "deeper": {"json": nested(3000)},
    "deep text": {"json": '{"items":' * 7000},
    "deep grammar": {"grammar": "root ::= " + "(" * 10_000},
    "blank lines": {"grammar": 'root ::= "a"' + "\n" * 16_000},
    "many rules": {
        "grammar": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(3000))
    },
    "multiples": {"json": {"items": [{"multipleOf": 999_983}]}},
    "properties": {"json": {"properties": {f"p{number}": {} for number in range(4000)}}},
    "repetition": {"regex": "((a{1,1000}){1,1000}b){1,1000}"},
    "automaton": {"regex": "(.*a.{300}|.*b.{400})" * 20},
    "intersection": {"grammar": "start: A\nA: /.*a.{30}/ & /.*b.{40}/ & ~/.*c.{50}/"},
    "stars": {"regex": ".*" * 2000},
    "ambiguous": {"grammar": 'start: s\ns: s s | s s s | "a" | '},
    "recursion": {"json": {"$ref": "#"}},
    "all of": {
        "json": {
            "allOf": [{"anyOf": [{"pattern": f"{i}{j}"} for j in range(20)]} for i in range(20)]
        }
    },
}


@pytest.mark.parametrize("constraint", INVALID.values(), ids=INVALID)
def test_invalid_constraints(shared_engine, constraint):
    with raises_input_error(ErrorCode.INVALID_FORMAT, "structured_outputs") as caught:
        shared_engine.sampling_params(structured_outputs=constraint)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("constraint", HOSTILE.values(), ids=HOSTILE)
def test_hostile_constraints_take_limited_time(compiler, shared_engine, constraint):
    """Each is refused, or its answers end: with an error, or after few seconds of work."""
    start = time.thread_time()
    size = len(shared_engine.processor.tokenizer)
    choose = random.Random(0).choice
    try:
        matcher = compiler.matcher(StructuredOutputsParams(**constraint))
        for _ in range(300):
            allowed = matcher.allowed_tokens(size).nonzero()[:, 0].tolist()
            if not allowed or matcher.is_stopped:
                break
            matcher.accept(choose([id_ for id_ in allowed if id_ != 2] or allowed))
    except InputError as error:
        assert error.code is ErrorCode.INVALID_FORMAT
    assert time.thread_time() - start < 6
