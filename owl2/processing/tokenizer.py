"""Text to ids, equal to those of SentencePiece, with the offsets of every token.

`<|image|>` is a special token that `add_image_token` adds to every tokenizer. A prompt is split at
each of them, and every segment is tokenized separately (Specification §1.5) for all tokenizers. For
SentencePiece models of LLaMA, a segment is split again at the control tokens (`<s>`, `</s>`,
`<unk>`), as in LLaMA's original tokenizer. No characters are stripped. `legacy` in
``tokenizer_config.json`` decides whether a text after a control token starts with "▁" (Model family
§0.1).
"""

import io
import json
import os
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from owl2.errors import ErrorCode, InputError
from owl2.processing.message_parts import IMAGE_TOKEN

Offsets = list[tuple[int, int]]

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# A character that is in no vocabulary: its tokens are bytes or `<unk>`, which never merge.
_BARRIER = "\ue000"

# Attributes of the object that do not belong in the file, which any LlamaTokenizer can read.
_NOT_SAVED = (
    "backend",
    "is_local",
    "local_files_only",
    "model_specific_special_tokens",  # also under their names
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
        legacy: Whether SentencePiece adds "▁" to the text after a control token, as at the start.

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
        legacy: bool | None = None,
        **kwargs: Any,
    ) -> None:
        # The chat template adds the end token.
        for key in ("add_eos_token", "special_tokens_pattern", "sp_model_kwargs"):
            kwargs.pop(key, None)
        if not os.path.isfile(vocab_file):
            raise InputError(
                f"No SentencePiece model at '{vocab_file}': pass the path of a {TOKENIZER_FILE}.",
                ErrorCode.FILE_NOT_FOUND,
            )
        self.add_bos_token = add_bos_token
        self.adds_prefix_after_control = legacy is not False
        try:
            super().__init__(
                vocab_file=os.fspath(vocab_file),
                bos_token=bos_token,
                eos_token=eos_token,
                unk_token=unk_token,
                pad_token=unk_token if pad_token is None else pad_token,
                padding_side=padding_side,
                legacy=True,  # of transformers, which this class replaces
                add_bos_token=add_bos_token,
                special_tokens_pattern="bos" if add_bos_token else "none",
                token_type_ids_pattern="all_zeros",
                **kwargs,
            )
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"'{vocab_file}' is not a SentencePiece model: {error}.", ErrorCode.UNREADABLE_FILE
            ) from error

    def get_vocab(self) -> dict[str, int]:
        ids = range(self.vocab_size)
        pieces = self.sp_model.id_to_piece(list(ids))  # one call, not one per token
        return dict(zip(pieces, ids, strict=True)) | self.added_tokens_encoder

    # -------------------------------------------------------------- text to ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """The ids of `text` without `<s>`, and the start and end of each in `text`.

        A character without a token becomes bytes: the last byte has the offsets of the character,
        the others have empty offsets at its start, as has a "▁" without a character.
        """
        control = self.added_tokens_encoder
        ids: list[int] = []
        offsets: Offsets = []
        start = 0
        previous = IMAGE_TOKEN  # the start of the text is a start of a segment
        for part in _splitter(tuple(control)).split(text):
            if part in control:
                ids.append(control[part])
                offsets.append((start, start + len(part)))
                previous = part
            elif part:
                has_prefix = self.adds_prefix_after_control or previous == IMAGE_TOKEN
                barrier = "" if has_prefix else _BARRIER
                encoded = self.sp_model.encode(barrier + part, out_type="offset_mapping")
                for id_, (begin, end) in zip(encoded["ids"], encoded["offsets"], strict=True):
                    if begin >= len(barrier):
                        ids.append(id_)
                        shift = start - len(barrier)
                        offsets.append((begin + shift, end + shift))
            start += len(part)
        return ids, offsets

    def tokenize(self, text: str, *_: Any, **__: Any) -> list[str]:
        return list(self.convert_ids_to_tokens(self.encode_with_offsets(text)[0]))

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
        control = special | self.added_tokens_decoder.keys()
        size = self.sp_model.get_piece_size()
        text: list[str] = []
        previous: int | None = None
        for is_control, run in groupby(ids, key=control.__contains__):
            if is_control:
                *kept, previous = run
                kept = [
                    id_
                    for id_ in (*kept, previous)
                    if not skip_special_tokens or id_ not in special
                ]
                text.extend(self.convert_ids_to_tokens(kept))
                continue
            run_ids = list(run)
            for id_ in (min(run_ids), max(run_ids)):
                if not 0 <= id_ < size:
                    raise InputError(
                        f"Token id {id_} cannot be decoded: the tokenizer has ids from 0 to "
                        f"{size - 1}.",
                        ErrorCode.INVALID_VALUE,
                    )
            fresh = (None, self.bos_token_id, self.added_tokens_encoder.get(IMAGE_TOKEN))
            has_prefix = self.adds_prefix_after_control or previous in fresh
            # A character in front keeps the space at the start, which would be removed as a prefix.
            barrier = [] if has_prefix else self.sp_model.encode(_BARRIER)
            length = len(self.sp_model.decode(barrier))
            text.append(self.sp_model.decode(barrier + run_ids)[length:])
        return "".join(text)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    # -------------------------------------------------------------- files

    def save_pretrained(  # type: ignore[override]  # further arguments in kwargs
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[str, ...]:
        """Write `tokenizer.model`, and a `tokenizer_config.json` for any LlamaTokenizer."""
        files = super().save_pretrained(save_directory, **kwargs)
        change_tokenizer_config(
            save_directory,
            _NOT_SAVED,
            tokenizer_class="LlamaTokenizer",
            add_bos_token=self.add_bos_token,
            add_eos_token=False,
            legacy=self.adds_prefix_after_control,
        )
        return files


def change_tokenizer_config(
    folder: str | os.PathLike[str], removed: Collection[str], **changes: Any
) -> None:
    """Change the ``tokenizer_config.json`` that transformers has written."""
    path = Path(folder) / TOKENIZER_CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in removed} | changes
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


@lru_cache(maxsize=16)
def _splitter(control_tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(control_tokens, key=len, reverse=True)
    # Without control tokens the pattern matches nothing.
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


# ------------------------------------------------------------------ any tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token_id: int | None = None) -> int:
    """Add `<|image|>` as the special token `image_token`, unless the tokenizer has it.

    Args:
        image_token_id: Its id. Ids before it that have no token become reserved tokens. Default:
            the next id of the tokenizer.

    Returns:
        Its id.

    Raises:
        InputError: `image_token_id` is in the vocabulary, or `<|image|>` has another id.
    """
    size, found = len(tokenizer), tokenizer.added_tokens_encoder.get(IMAGE_TOKEN)
    wanted = image_token_id if image_token_id is not None else size if found is None else found
    if wanted != found if found is not None else wanted < size:
        has = f"has {size} tokens" if found is None else f"has {IMAGE_TOKEN} with the id {found}"
        raise InputError(
            f"The image token cannot have the id {wanted}, because the tokenizer {has}.",
            ErrorCode.INVALID_VALUE,
        )
    if "image_token" not in tokenizer.special_tokens_map:
        tokenizer._set_model_specific_special_tokens({"image_token": IMAGE_TOKEN})
    if found is None:
        names = [*(f"<|reserved_token_{id_}|>" for id_ in range(size, wanted)), IMAGE_TOKEN]
        tokens: Any = [AddedToken(name, special=True, normalized=False) for name in names]
        tokenizer.add_tokens(tokens, special_tokens=True)
    return wanted


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a prompt, with one id for each `<|image|>`, without special tokens."""
    if isinstance(tokenizer, Owl2Tokenizer):
        return tokenizer.encode_with_offsets(text)[0]
    parts = [part for part in _splitter((IMAGE_TOKEN,)).split(text) if part]
    options = {"add_special_tokens": False, "verbose": False}
    return [id_ for part in parts for id_ in tokenizer.encode(part, **options)]


def encode_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Offsets]:
    """`encode` of a segment between images, and the start and end of each token in `text`.

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
    bos = tokenizer.bos_token_id
    if isinstance(tokenizer, Owl2Tokenizer):
        return [bos] if tokenizer.add_bos_token and bos is not None else []
    return [bos] if tokenizer("x")["input_ids"][0] == bos else []


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
    # In LLaMA's models a line break is a byte token and never part of a longer token.
    lines = (line for text in texts for line in text.split("\n") if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
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
    target.write_bytes(model.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())
