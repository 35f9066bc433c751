"""Text to ids, equal to those of SentencePiece, with the offsets of every token.

A prompt is split at each `<|image|>`, and every segment is tokenized separately (Specification
§1.5) for all tokenizers; `encode` tokenizes one segment. For SentencePiece models of LLaMA, a
segment is split again at the control tokens (`<s>`, `</s>`, `<unk>`), as in LLaMA's original
tokenizer. No characters are stripped.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from owl2.errors import ErrorCode, InputError

Offsets = list[tuple[int, int]]

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# Attributes of the object that do not belong in the file, which any LlamaTokenizer can read.
_NOT_SAVED = (
    "backend",
    "is_local",
    "local_files_only",
    "special_tokens_pattern",
    "vocab_file",
    "name_or_path",
)


class Owl2Tokenizer(SentencePieceBackend):
    """A SentencePiece model as a transformers tokenizer, with the ids of SentencePiece.

    `<s>` is prepended once. LLaMA has no padding token; the released checkpoint uses `<unk>`.
    `decode(encode(text))` equals `text`, without `<s>`.

    Args:
        vocab_file: The `tokenizer.model`.

    Raises:
        InputError: The file is missing or is not a SentencePiece model.
    """

    vocab_files_names = {"vocab_file": TOKENIZER_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        unk_token: Any = "<unk>",
        pad_token: Any = None,
        add_bos_token: bool = True,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> None:
        # `legacy` selects how text after a control token is tokenized. The checkpoint was trained
        # with the ids of SentencePiece, so the value in the file is ignored. The chat template adds
        # the end token.
        for key in ("legacy", "add_eos_token", "special_tokens_pattern", "sp_model_kwargs"):
            kwargs.pop(key, None)
        if not os.path.isfile(vocab_file):
            raise InputError(
                f"No SentencePiece model at '{vocab_file}': pass the path of a {TOKENIZER_FILE}.",
                ErrorCode.FILE_NOT_FOUND,
            )
        self._splitter: re.Pattern[str] | None = None
        self.add_bos_token = add_bos_token
        try:
            super().__init__(
                vocab_file=os.fspath(vocab_file),
                bos_token=bos_token,
                eos_token=eos_token,
                unk_token=unk_token,
                pad_token=unk_token if pad_token is None else pad_token,
                padding_side=padding_side,
                legacy=True,
                special_tokens_pattern="bos" if add_bos_token else "none",
                token_type_ids_pattern="all_zeros",
                **kwargs,
            )
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"'{vocab_file}' is not a SentencePiece model: {error}.", ErrorCode.UNREADABLE_FILE
            ) from error

    # -------------------------------------------------------------- text to ids

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        # transformers calls this method whenever tokens are added.
        super()._update_trie(unique_no_split_tokens)
        control = {
            *self._added_tokens_encoder,
            *self.all_special_tokens,
            *(unique_no_split_tokens or []),
        }
        longest_first = sorted(filter(None, control), key=lambda token: (-len(token), token))
        self._splitter = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
            if longest_first
            else None
        )

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """The ids of `text` without `<s>`, and the start and end of each in `text`.

        A character without a token becomes bytes: the last byte has the offsets of the character,
        the others have empty offsets at its start, as has a "▁" without a character.
        """
        ids: list[int] = []
        offsets: Offsets = []
        start = 0
        for index, part in enumerate(self._splitter.split(text) if self._splitter else [text]):
            if index % 2:
                ids.append(self._control_id(part))
                offsets.append((start, start + len(part)))
            elif part:
                part_ids, part_offsets = _sentencepiece_offsets(self.sp_model, part)
                ids += part_ids
                offsets += [(start + begin, start + end) for begin, end in part_offsets]
            start += len(part)
        return ids, offsets

    def encode_exact(self, text: str) -> list[int]:
        """The ids of `encode_with_offsets`, without offsets."""
        ids: list[int] = []
        for index, part in enumerate(self._splitter.split(text) if self._splitter else [text]):
            if index % 2:
                ids.append(self._control_id(part))
            elif part:
                ids += self.sp_model.encode(part)
        return ids

    def _control_id(self, token: str) -> int:
        known = self._added_tokens_encoder.get(token)
        return self.sp_model.piece_to_id(token) if known is None else known

    # -------------------------------------------------------------- ids to text

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        """The inverse of encoding.

        SentencePiece decodes the runs between control tokens and removes the space that it added
        before each run. `clean_up_tokenization_spaces` is ignored.
        """
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        special = set(self.all_special_ids)
        size = self.sp_model.get_piece_size()
        text = []
        for is_control, run in groupby(
            ids, key=lambda id_: id_ in self._added_tokens_decoder or id_ in special
        ):
            if not is_control:
                run_ids = list(run)
                if (worst := max(run_ids)) >= size or min(run_ids) < 0:
                    raise InputError(
                        f"Token id {worst if worst >= size else min(run_ids)} cannot be decoded: "
                        f"the tokenizer has ids from 0 to {size - 1}.",
                        ErrorCode.INVALID_VALUE,
                    )
                text.append(self.sp_model.decode(run_ids))
            else:
                kept = (id_ for id_ in run if not (skip_special_tokens and id_ in special))
                text.extend(self.convert_ids_to_tokens(id_) for id_ in kept)
        return "".join(text)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    # -------------------------------------------------------------- files

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write `tokenizer.model` from memory, because the original file may have changed."""
        path = (
            Path(save_directory)
            / f"{filename_prefix + '-' if filename_prefix else ''}{TOKENIZER_FILE}"
        )
        path.write_bytes(self.sp_model.serialized_model_proto())
        return (str(path),)

    def save_pretrained(  # type: ignore[override]  # further arguments in kwargs
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[str, ...]:
        """Write `tokenizer.model`, and a `tokenizer_config.json` for any LlamaTokenizer."""
        files = super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / TOKENIZER_CONFIG_FILE
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in _NOT_SAVED:
            config.pop(key, None)
        config |= {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": self.add_bos_token,
            "add_eos_token": False,
        }
        path.write_text(
            json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
            encoding="utf-8",
        )
        return files


def _sentencepiece_offsets(model: Any, text: str) -> tuple[list[int], Offsets]:
    if hasattr(model, "EncodeAsOffsetMapping"):
        mapping = model.encode(text, out_type="offset_mapping")
        return mapping["ids"], mapping["offsets"]
    # sentencepiece before 0.2.2 returns the same in this form, which later versions reject.
    pieces = model.encode(text, out_type="immutable_proto").pieces
    return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


# ------------------------------------------------------------------ any tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of one segment of a prompt (between two images), without special tokens."""
    if isinstance(tokenizer, Owl2Tokenizer):
        return tokenizer.encode_exact(text)
    return (
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
    )


def encode_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Offsets]:
    """`encode`, and the start and end of each token in `text`.

    Raises:
        InputError: The tokenizer has no offsets (neither SentencePiece nor a fast tokenizer).
    """
    if isinstance(tokenizer, Owl2Tokenizer):
        return tokenizer.encode_with_offsets(text)
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} has no offsets, so there is no loss mask. Use the fast "
            "version of this tokenizer (a tokenizer.json), or its tokenizer.model.",
            ErrorCode.UNSUPPORTED,
        )
    if not text:
        return [], []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer prepends: `[bos]`, or none (GPT-2).

    End tokens are added by the chat template and not by the tokenizer.
    """
    if tokenizer.bos_token_id is None:
        return []
    if isinstance(tokenizer, Owl2Tokenizer):
        return [tokenizer.bos_token_id] if tokenizer.add_bos_token else []
    return (
        [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    )


def decode_with_images(
    tokenizer: PreTrainedTokenizerBase,
    ids: Iterable[int],
    image_token_id: int,
    num_image_tokens: int,
    skip_special_tokens: bool,
    **kwargs: Any,
) -> str:
    """Decode ids; the K+1 tokens of an image become `<|image|>`, or nothing if it is skipped."""
    texts = []
    for is_image, run in groupby(ids, key=lambda id_: id_ == image_token_id):
        if not is_image:
            texts.append(str(tokenizer.decode(list(run), skip_special_tokens, **kwargs)))
        elif not skip_special_tokens:
            texts.append("<|image|>" * -(-len(list(run)) // num_image_tokens))
    return "".join(texts)


# ------------------------------------------------------------------ training a tokenizer


def train_tokenizer(texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int) -> int:
    """Train a small SentencePiece model with LLaMA's conventions.

    BPE with byte fallback, no normalization, no stripping, separate digits, `<unk>` 0, `<s>` 1,
    `</s>` 2. The result is deterministic.

    Args:
        path: The `tokenizer.model` to write.
        vocab_size: Maximum size of the vocabulary; few texts result in fewer tokens.

    Returns:
        Size of the vocabulary.

    Raises:
        InputError: There are no texts, or `vocab_size` is smaller than the 259 tokens that are
            always included plus the characters of `texts`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        needed = re.search(r"size is smaller than required_chars\. \d+ vs (\d+)", str(error))
        reason = f"these texts require at least {needed[1]}" if needed else str(error)
        raise InputError(
            f"A tokenizer with vocab_size {vocab_size} cannot be trained: {reason}. It must "
            "include 259 tokens (3 control tokens, 256 bytes) and every character of the texts.",
            ErrorCode.INVALID_VALUE,
        ) from error
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(model.getvalue())
    part.replace(target)
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # In LLaMA's models a line break is a byte token and never part of a longer token.
    for text in texts:
        yield from filter(None, text.split("\n"))
