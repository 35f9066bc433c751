"""Structured output: answers that follow a JSON schema, a regular expression, or a grammar.

::

    StructuredOutputsParams ──GrammarCompiler, in the caller's thread──► GrammarMatcher
    ──before each token──► allowed tokens (V,) ──sample──► token ──GrammarMatcher.accept──┘

The library is llguidance. It is imported when it is used. An answer may begin with one space, as
answers do in the training format; `Engine` removes it.

A schema or a grammar may come from an untrusted client. Its size, the size of its automata, the
time to compile it, and the time per answer are limited.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch

from owl2.engine.sampling_params import StructuredOutputsParams
from owl2.errors import ErrorCode, InputError, require_package, shorten

# The values of `format` that llguidance enforces; it rejects others.
FORMATS = (
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "time",
    "uri",
    "uuid",
)
_DATA = ("const", "default", "enum", "examples")  # keywords whose values are not schemas
# Of the JSON that describes a grammar. A schema of 5,000 properties has more.
MAX_CHARACTERS = 65_536
MAX_GBNF_CHARACTERS = 16_384  # the conversion to Lark takes quadratic time
# The sum of all values of "multipleOf" (without a decimal point) in a schema. The time to compile
# them grows with it: 0.1 s.
MAX_MULTIPLES = 10_000
MAX_SECONDS = 1.0  # of one core, for the masks of one answer; usual grammars take 0.00006 per token
MAX_CACHED_GRAMMARS = 128
# Limits of llguidance. They bound the time of a compilation and of a mask to about a second.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
# Between the tokens of JSON: a space, or a line break and the indentation of the next line. Models
# that were not trained for JSON would otherwise write spaces without end.
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,20}"
_GBNF = re.compile(r"^[\w-]+\s*::=", re.MULTILINE)
# Without `no_forcing`, llguidance would tokenize text that must follow, and exclude other tokens.
# Its tokens can differ from those of the complete text, which the model was trained with.
START = '%llguidance {"no_forcing": true}\nstart: " "? @answer'


def llguidance_grammar(params: StructuredOutputsParams) -> str:
    """What answers must match, as the JSON that llguidance reads.

    Raises:
        InputError: The schema or the grammar is not valid, or too large; or llguidance is not
            installed.
    """
    require_package("llguidance", "structured_outputs", "structured")
    import llguidance

    if params.json is not None or params.json_object:
        answer: dict[str, Any] = {"json_schema": _schema(params)}
    elif params.choice is not None:
        # One terminal: a rule would have a state for each choice.
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        answer = {"lark_grammar": f"start: CHOICE\nCHOICE: {texts}"}
    elif params.regex is not None:
        regex = llguidance.regex_to_lark(params.regex, use_ascii="d")
        answer = {"lark_grammar": f"start: /{regex}/"}
    else:
        grammar = params.grammar or ""
        _check_size(grammar)
        if "%json" in grammar:
            raise _error("%json is not supported", "use structured_outputs.json")
        if _GBNF.search(grammar):
            from llguidance.gbnf_to_lark import gbnf_to_lark

            _check_size(grammar, MAX_GBNF_CHARACTERS)
            try:
                grammar = gbnf_to_lark(grammar)
            except Exception as error:  # of several types, for example RecursionError
                raise _error(str(error), "use Lark's or llama.cpp's notation") from error
        answer = {"lark_grammar": grammar}
    grammars = [{"lark_grammar": START}, {"name": "answer"} | answer]
    try:
        text = json.dumps({"grammars": grammars})
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(f"not JSON ({error})", "use a JSON schema") from error
    _check_size(text)
    return text


def _schema(params: StructuredOutputsParams) -> dict[str, Any]:
    schema: Any = {"type": "object"} if params.json is None else params.json
    if isinstance(schema, str):
        _check_size(schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _error(f"not JSON ({error})", "use a JSON schema") from error
    if not isinstance(schema, dict):
        raise _error("not an object", "use a JSON schema")
    if (total := _sum_of_multiples(schema)) > MAX_MULTIPLES:
        raise _error(f"multipleOf is {total} in all", f"use at most {MAX_MULTIPLES}")
    try:
        schema = _without_unknown_formats(schema)
    except RecursionError as error:
        raise _error("the schema is too deep") from error
    pattern = params.whitespace_pattern or WHITESPACE
    whitespace: dict[str, Any] = {"whitespace_pattern": pattern}
    if params.disable_any_whitespace:
        whitespace = {"whitespace_flexible": False}
    return schema | {"x-guidance": whitespace}


def _error(reason: str, advice: str = "simplify or correct it") -> InputError:
    message = f"structured_outputs cannot be used: {shorten(reason, 300, str)}; {advice}."
    return InputError(message, ErrorCode.INVALID_FORMAT)


def _check_size(text: str, limit: int = MAX_CHARACTERS) -> None:
    if len(text) > limit:
        raise _error(f"{len(text)} characters", f"use at most {limit}")


def _without_unknown_formats(schema: Any) -> Any:
    """A copy without the formats that llguidance rejects, such as pydantic's `password`.

    In JSON schemas, they are annotations.
    """
    if isinstance(schema, list):
        return list(map(_without_unknown_formats, schema))
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in _DATA else _without_unknown_formats(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in FORMATS
    }


def _sum_of_multiples(schema: Any) -> int:
    total, remaining = 0, [schema]
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            remaining += value.values()
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float):
                _, digits, exponent = Decimal(repr(multiple)).as_tuple()
                shift = exponent if isinstance(exponent, int) and exponent > 0 else 0
                total += int("".join(map(str, digits)) + "0" * min(shift, 20))
        elif isinstance(value, list):
            remaining += value
    return total


class GrammarMatcher:
    """The state of one answer in its grammar.

    Attributes:
        error: Why the answer cannot be continued; None if it can.
    """

    def __init__(self, matcher: Any) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._seconds = 0.0

    @property
    def is_stopped(self) -> bool:
        """Whether the answer is complete, and no token can follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> "GrammarMatcher":
        """A matcher in the same state."""
        return GrammarMatcher(self._matcher.deep_copy())

    def allowed_tokens(self, vocab_size: int) -> torch.Tensor:
        """(V,), boolean, on the CPU: the tokens that can follow. All are False after an error.

        End tokens are allowed where the answer may end.
        """
        bits = np.frombuffer(self._timed(self._matcher.compute_bitmask), dtype=np.uint8)
        if self.error is not None:
            return torch.zeros(vocab_size, dtype=torch.bool)
        mask = np.unpackbits(bits, count=vocab_size, bitorder="little")  # 0 beyond its end
        if not mask.any():
            self.error = "no token of the model can follow"
        return torch.from_numpy(mask.view(bool))

    def accept(self, token: int) -> None:
        """Append a token to the answer."""
        self._timed(self._matcher.consume_token, token)

    def input_error(self) -> InputError:
        """The error for the caller."""
        return _error(str(self.error))

    def _timed(self, function: Callable[..., Any], *args: Any) -> Any:
        start = time.thread_time()
        result = function(*args)
        self._seconds += time.thread_time() - start
        if self._matcher.is_error():
            message = self._matcher.get_error().partition("\n<")[0]  # a dump of its state
            self.error = "not supported" if "panic" in message else " ".join(message.split())
        elif self._seconds > MAX_SECONDS:
            self.error = f"it is too complex: its masks took {self._seconds:.1f} seconds"
        return result


class _Vocabulary:
    """The attributes of a tokenizer that llguidance's `TokenizerWrapper` reads."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], end_ids: Sequence[int]) -> None:
        self.eos_token_id = end_ids[0] if end_ids else None
        self.tokens = tokens

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("`no_forcing` makes this unnecessary")


class GrammarCompiler:
    """Compiles what answers must match, for the vocabulary of one model; for any thread.

    Args:
        token_text: See `detokenizer.token_texts`.
        vocab_size: V, of the model.
    """

    def __init__(
        self,
        token_text: Callable[[int], tuple[str, bytes]],
        vocab_size: int,
        end_ids: Sequence[int],
    ) -> None:
        self._token_text = token_text
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._lock = Lock()
        self._vocabulary: Any = None
        self._compile = lru_cache(MAX_CACHED_GRAMMARS)(self._compile_text)

    def matcher(self, params: StructuredOutputsParams | None) -> GrammarMatcher | None:
        """A matcher at the start of an answer; None without parameters.

        Equal parameters are compiled once.

        Raises:
            InputError: The schema or the grammar is not valid, not supported, or too complex; or
                as `llguidance_grammar`.
        """
        return None if params is None else self._compile(llguidance_grammar(params)).copy()

    def _compile_text(self, text: str) -> GrammarMatcher:
        import llguidance

        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = GrammarMatcher(
            llguidance.LLMatcher(self._get_vocabulary(), text, log_level=0, limits=limits)
        )
        matcher.allowed_tokens(self._vocab_size)  # finds more errors
        if matcher.error is not None:
            raise matcher.input_error()
        return matcher

    def _get_vocabulary(self) -> Any:
        """The tokens in the form of llguidance; this takes half a second for 32,000."""
        import llguidance

        with self._lock:
            if self._vocabulary is None:
                # Special tokens have no bytes, so that no grammar allows them.
                tokens = [self._token_text(id_)[1] for id_ in range(self._vocab_size)]
                vocabulary = _Vocabulary(tokens, self._end_ids)
                self._vocabulary = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(vocabulary), eos_token=list(self._end_ids) or None
                )
            return self._vocabulary
