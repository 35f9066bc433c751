"""Sampling parameters: the options of an answer, over the defaults of its checkpoint."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from owl2.errors import ErrorCode, InputError, shorten
from owl2.processing.prepared_prompt import check_length

DEFAULT_MAX_NEW_TOKENS = 512
MAX_SEED = 2**32 - 1  # training accepts the same range
MAX_TOP_LOGPROBS = 20
STRUCTURES = ("json", "regex", "choice", "grammar", "json_object")
# Parameters that request sampling by being set. Those of `BATCHED` are applied to a batch.
BATCHED = ("temperature", "top_k", "top_p", "min_p")
_SAMPLING = (*BATCHED, "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Lower temperatures are treated as 0. Logits divided by them are not finite, so that nothing can be
# drawn from them, and the other sequences of the step would fail as well.
MIN_TEMPERATURE = 1e-5
# Options of a `generation_config` that change answers and are not supported, with the values that
# have no effect. Options of the memory, the speed and the form of the result have none either.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (None, 1)),
    **dict.fromkeys(("penalty_alpha", "token_healing"), (None, 0)),
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers", "max_time"), (None,)),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
}


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must match: exactly one of the first five. The names are those of vLLM.

    Attributes:
        json: A JSON schema, as a dictionary or as text. Properties have the order of the schema.
        regex: A regular expression for the complete answer, without look-around.
        choice: The possible answers.
        grammar: A context-free grammar in Lark's or llama.cpp's (GBNF) notation.
        json_object: True: any JSON object.
        disable_any_whitespace: JSON without white space outside of strings.
        whitespace_pattern: A regular expression for the white space in JSON.

    Raises:
        InputError: None or several of the first five, or a value of a wrong type.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise InputError(
                f"structured_outputs needs exactly one of {', '.join(STRUCTURES)}; it has "
                f"{' and '.join(given) or 'none'}.",
                ErrorCode.CONFLICT if given else ErrorCode.MISSING_VALUE,
            )
        is_list = isinstance(self.choice, list | tuple) and bool(self.choice)
        texts = self.choice if is_list and self.choice else ()
        is_list &= all(isinstance(text, str) and text.strip() for text in texts)
        for name, is_valid, expected in (
            ("json", isinstance(self.json, str | dict | None), "a JSON schema"),
            ("choice", self.choice is None or is_list, "a list of texts"),
            ("regex", isinstance(self.regex, str | None), "a text"),
            ("grammar", isinstance(self.grammar, str | None), "a text"),
            ("json_object", isinstance(self.json_object, bool | None), "true"),
            ("disable_any_whitespace", isinstance(self.disable_any_whitespace, bool), "a boolean"),
            ("whitespace_pattern", isinstance(self.whitespace_pattern, str | None), "a text"),
        ):
            if not is_valid:
                raise InputError(
                    f"structured_outputs.{name} is {shorten(getattr(self, name))}; it must be "
                    f"{expected}.",
                    ErrorCode.INVALID_TYPE,
                )

    @classmethod
    def from_value(cls, value: Any) -> "StructuredOutputsParams":
        """A mapping with these fields, or an object of this class.

        Raises:
            InputError: An unknown field, or as the class.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InputError(
                f"structured_outputs is {shorten(value)}; it must be a dictionary.",
                ErrorCode.INVALID_TYPE,
            )
        if unknown := value.keys() - {field.name for field in fields(cls)}:
            raise InputError(
                f"structured_outputs has no field {', '.join(map(repr, sorted(unknown)))}.",
                ErrorCode.UNKNOWN_NAME,
            )
        return cls(**value)


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is generated, and when it ends.

    Options that transformers' `GenerationConfig` has as well have its names and effects.
    `Engine.chat`, `.batch`, `.stream` and `.complete` take the fields as keyword arguments; there,
    None stands for the value in the checkpoint's `generation_config`.

    Attributes:
        max_new_tokens: Maximum number of generated tokens; at most what fits into the context.
        max_length: Maximum number of tokens of prompt and answer. The value of a checkpoint applies
            if neither the checkpoint nor the call sets `max_new_tokens`.
        min_new_tokens, min_length: No end token before this length.
        do_sample: Draw tokens instead of taking the most probable one.
        temperature: Divisor of the logits; below 0.00001 the answer is greedy.
        top_p: Sample from the smallest set of most probable tokens with this total probability.
        top_k: Sample from this number of most probable tokens; 0: all.
        min_p: Exclude tokens below this fraction of the highest probability.
        top_h, typical_p, epsilon_cutoff, eta_cutoff: Other rules that exclude improbable tokens.
        repetition_penalty: Above 1: tokens of prompt and answer become less probable.
        encoder_repetition_penalty: Above 1: tokens of the prompt become more probable.
        presence_penalty: Subtracted from the logits of the tokens in the answer so far.
        frequency_penalty: Subtracted for each time that a token occurs in the answer so far.
        no_repeat_ngram_size: No sequence of this length occurs twice in prompt and answer.
        encoder_no_repeat_ngram_size: No sequence of this length of the prompt is in the answer.
        bad_words_ids: Sequences of tokens that the answer does not contain.
        suppress_tokens, begin_suppress_tokens: Tokens that the answer does not contain, or does not
            begin with.
        sequence_bias: (sequence of tokens, value added to the logit of its last token) pairs.
        logit_bias: Values added to the logits of token ids.
        exponential_decay_length_penalty: (length, factor): above the length of the answer, the end
            token becomes more probable.
        forced_eos_token_id: The last token of an answer of the maximum length.
        remove_invalid_values: Replace NaN and infinity instead of raising an error.
        renormalize_logits: Normalize the changed logits.
        seed: Answer i of a request (counted from 0 over all its conversations) draws from a
            generator with the seed `seed` + i. None: torch's global generator.
        n: Number of answers to each prompt, which is computed once.
        stop: Strings that end the answer; they are not part of it.
        stop_token_ids: Tokens that end the answer, in addition to the end tokens of the checkpoint.
        ignore_eos: The end tokens of the checkpoint do not end the answer.
        skip_special_tokens: Special tokens are not part of the text.
        top_logprobs: Report the log-probability of each token and of this number of most probable
            alternatives, 0 to 20. None: no log-probabilities.
        structured_outputs: What the answer must match: a JSON schema, choices, a regular expression
            or a grammar; also as a dictionary with the fields of `StructuredOutputsParams`.

    Raises:
        InputError: A value is out of its range.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    sequence_bias: Any = None
    logit_bias: Mapping[int, float] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    top_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def max_answer_tokens(self, ids: Sequence[int], context_length: int) -> int:
        """The maximum number of tokens of the answer to a prompt with these ids.

        Raises:
            InputError: The prompt leaves no token for the answer.
        """
        check_length(ids, context_length)
        limit = min(self.max_length or context_length, context_length)
        check_length(ids, limit, name="max_length=")
        return min(self.max_new_tokens, limit - len(ids))

    def __post_init__(self) -> None:
        structured = self.structured_outputs is not None
        for name, is_valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", abs(self.presence_penalty) <= 2, "from -2 to 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2, "from -2 to 2"),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or more"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 or more"),
            ("seed", 0 <= (self.seed or 0) <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            ("n", self.n >= 1, "1 or more"),
            ("top_logprobs", 0 <= (self.top_logprobs or 0) <= MAX_TOP_LOGPROBS, "from 0 to 20"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
            ("ignore_eos", not (self.ignore_eos and structured), "False with structured_outputs"),
        ):
            if not is_valid:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be {expected}.",
                    ErrorCode.INVALID_VALUE,
                )

    @classmethod
    def from_options(cls, defaults: GenerationConfig, **options: Any) -> "SamplingParams":
        """The options that are not None, over the defaults of a checkpoint.

        Setting temperature, top_p, top_k, min_p or another parameter of sampling implies
        do_sample=True. `stop` may be one string; its default is `stop_strings`.

        Raises:
            InputError: A value is out of its range, or sampling options with do_sample=False.
            TypeError: An unknown option.
        """
        requested = {name: value for name, value in options.items() if value is not None}
        sampling = [name for name in _SAMPLING if name in requested]
        if sampling and requested.get("do_sample") is False and requested.get("temperature") != 0:
            raise InputError(
                f"{' and '.join(sampling)} have no effect with do_sample=False.",
                ErrorCode.CONFLICT,
            )
        values = {field.name: getattr(defaults, field.name, None) for field in fields(cls)}
        values["stop"] = defaults.stop_strings
        values = {name: value for name, value in values.items() if value is not None} | requested
        if "max_new_tokens" in values and "max_length" not in requested:
            values.pop("max_length", None)
        if sampling and "do_sample" not in requested:
            values["do_sample"] = True
        stop = values.pop("stop", ())
        values["stop"] = (stop,) * bool(stop) if isinstance(stop, str) else tuple(stop)
        if (structured := values.get("structured_outputs")) is not None:
            values["structured_outputs"] = StructuredOutputsParams.from_value(structured)
        params = cls(**values)
        if params.temperature < MIN_TEMPERATURE:
            params = replace(params, do_sample=False)
        return params

    def end_ids(self, end_ids: Collection[int]) -> list[int]:
        """The tokens that end an answer of a checkpoint with these end tokens."""
        return [*(() if self.ignore_eos else end_ids), *self.stop_token_ids]

    def generator(self, index: int, device: torch.device) -> torch.Generator | None:
        """The random generator of answer `index`; None: torch's global one."""
        if self.seed is None or not self.do_sample:
            return None
        return torch.Generator(device).manual_seed(self.seed + index)


def check_generation_config(defaults: GenerationConfig) -> None:
    """Reject options of a checkpoint that would change its answers in `generate` only.

    Raises:
        InputError: The name and the value of the option.
    """
    for name, neutral in _UNSUPPORTED.items():
        if (value := getattr(defaults, name, None)) not in neutral:
            raise InputError(
                f"The checkpoint's generation_config has {name}={value!r}, which the engine does "
                "not support: remove it from generation_config.json, or use the model's "
                "`generate`.",
                ErrorCode.UNSUPPORTED,
            )


def end_ids(defaults: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens of a checkpoint, and the one that training labels."""
    eos: int | list[int] | None = defaults.eos_token_id
    ids = [eos] if isinstance(eos, int) else list(eos or ())
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [*ids, own]


def changed_options(params: SamplingParams) -> dict[str, Any]:
    """The options that differ from their defaults."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return {
        name: value for name, value in values.items() if value != getattr(params.__class__, name)
    }
