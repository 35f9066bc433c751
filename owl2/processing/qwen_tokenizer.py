"""Tokenizer of mPLUG-Owl2.1: the byte-level BPE of ``qwen.tiktoken`` (Model family §7.5).

The file has a line "base64 rank" for each token. It is converted to a tokenizer of `tokenizers`,
so that the package tiktoken is not required.
"""

import base64
import os
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from owl2.errors import ErrorCode, InputError
from owl2.processing.tokenizer import change_tokenizer_config

QWEN_FILE = "qwen.tiktoken"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    *(END_OF_TEXT, "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
)
# Attributes of the object that do not belong in `tokenizer_config.json`.
_DERIVED = {"tokenizer_object", "auto_map", "vocab", "merges", "vocab_file"}
_DERIVED |= {"backend", "is_local", "local_files_only", "name_or_path"}
# Contractions; letters after at most one other character; single digits; symbols with line breaks;
# line breaks; white space before the last blank of a run; white space.
_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class QwenTokenizer(PreTrainedTokenizerFast):
    """The ids of Qwen's tokenizer. There is no start token; `<|endoftext|>` ends an answer.

    Args:
        vocab_file: The `qwen.tiktoken`.

    Raises:
        InputError: The file is missing or has another content.
    """

    vocab_files_names = {"vocab_file": QWEN_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str | os.PathLike[str], **kwargs: Any) -> None:
        saved = kwargs.pop("tokenizer_file", None)  # with added tokens
        self.tiktoken_file = os.fspath(vocab_file)
        tokenizer = Tokenizer.from_file(saved) if saved else read_tiktoken(vocab_file)
        defaults = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
        given = {k: v for k, v in kwargs.items() if v is not None and k not in _DERIVED}
        super().__init__(tokenizer_object=tokenizer, **(defaults | given))

    def save_pretrained(  # type: ignore[override]  # further arguments in kwargs
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[str, ...]:
        """Write `qwen.tiktoken` and a `tokenizer_config.json` with the class of the authors.

        `tokenizer.json` contains added tokens.
        """
        files = tuple(super().save_pretrained(save_directory, **kwargs))
        folder = Path(save_directory)
        if (folder / QWEN_FILE).resolve() != Path(self.tiktoken_file).resolve():
            shutil.copyfile(self.tiktoken_file, folder / QWEN_FILE)
        change_tokenizer_config(folder, _DERIVED, tokenizer_class="QWenTokenizer")
        return (*files, str(folder / QWEN_FILE))


def read_tiktoken(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a file of tiktoken, with the special tokens after its ranks.

    Raises:
        InputError: The file is missing or has another content.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
        pairs = [line.split() for line in lines if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as error:
        raise InputError(f"No vocabulary at '{path}'.", ErrorCode.FILE_NOT_FOUND) from error
    except ValueError as error:
        raise InputError(
            f"'{path}' is not a vocabulary of tiktoken, lines of base64 and rank: {error}.",
            ErrorCode.UNREADABLE_FILE,
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(
        bytes([byte]) not in ranks for byte in range(256)
    ):
        raise InputError(
            f"'{path}' must have the ranks from 0 without gaps, and every byte.",
            ErrorCode.UNREADABLE_FILE,
        )
    characters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    merges = [(text(left), text(right)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that form a token, ordered by its rank, as tiktoken merges them."""
    pairs = [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return sorted(pairs, key=lambda pair: (ranks[pair[0] + pair[1]], ranks[pair[0]]))
