"""Text → ids, exactly as SentencePiece gives them, with the place of every token in the text.

A prompt is split at each `<|image|>` and every piece is tokenised **on its own** (SPEC 1.5),
whatever the tokenizer: `encode` does one such piece. For LLaMA's SentencePiece models a piece is
split again at the control tokens (`<s>`, `</s>`, `<unk>`), as LLaMA's original tokenizer does;
nothing is stripped.
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

from owl2.errors import InputError

Offsets = list[tuple[int, int]]

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# What transformers keeps about a tokenizer object, and what only this class understands: not for
# the file, which LlamaTokenizer classes of any version read.
_NOT_SAVED = (
    "backend",
    "is_local",
    "local_files_only",
    "special_tokens_pattern",
    "vocab_file",
    "name_or_path",
)


class Owl2Tokenizer(SentencePieceBackend):
    """A SentencePiece model as a transformers tokenizer; ids equal SentencePiece's own, runs of
    spaces included.

    `vocab_file`: the `tokenizer.model`. `<s>` is put at the start once; LLaMA has no token for
    padding, and the released checkpoint pads with `<unk>`. `decode(encode(text))` is `text` again
    (less `<s>`).

    Raises `InputError` when the file is missing or is no SentencePiece model.
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
        # `legacy` in a file means how LLaMA treats text after a control token. The checkpoint was
        # trained with the first way, and the ids of SentencePiece are what this class is for, so
        # the file is not asked. The end token is the chat template's business.
        for key in ("legacy", "add_eos_token", "special_tokens_pattern", "sp_model_kwargs"):
            kwargs.pop(key, None)
        if not os.path.isfile(vocab_file):
            raise InputError(
                f"No SentencePiece model at '{vocab_file}': give the path of a {TOKENIZER_FILE}."
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
            raise InputError(f"'{vocab_file}' is no SentencePiece model: {error}.") from error

    # -------------------------------------------------------------- text → ids

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        # Called by transformers whenever tokens are added: the moment to rebuild our splitter.
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
        """`text` → its ids, no `<s>` added, and for each the (start, end) of its characters in
        `text`.

        The bytes of a character that has no token of its own, and a "▁" that stands for no
        character, have an empty place where their character begins; the last byte has the whole
        character.
        """
        ids: list[int] = []
        offsets: Offsets = []
        start = 0
        for number, part in enumerate(self._splitter.split(text) if self._splitter else [text]):
            if number % 2:
                ids.append(self._control_id(part))
                offsets.append((start, start + len(part)))
            elif part:
                part_ids, part_offsets = _sentencepiece_offsets(self.sp_model, part)
                ids += part_ids
                offsets += [(start + begin, start + end) for begin, end in part_offsets]
            start += len(part)
        return ids, offsets

    def encode_exact(self, text: str) -> list[int]:
        """The ids of `encode_with_offsets`, for when the places are not needed."""
        ids: list[int] = []
        for number, part in enumerate(self._splitter.split(text) if self._splitter else [text]):
            if number % 2:
                ids.append(self._control_id(part))
            elif part:
                ids += self.sp_model.encode(part)
        return ids

    def _control_id(self, token: str) -> int:
        known = self._added_tokens_encoder.get(token)
        return self.sp_model.piece_to_id(token) if known is None else known

    # -------------------------------------------------------------- ids → text

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        """The inverse of encoding: runs between control tokens are decoded by SentencePiece, which
        drops the space it put before each run. `clean_up_tokenization_spaces` is for other kinds of
        tokenizer: ignored."""
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
                        f"the tokenizer has ids from 0 to {size - 1}."
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
        """Writes `tokenizer.model` from memory: the file it came from may be gone or changed."""
        path = (
            Path(save_directory)
            / f"{filename_prefix + '-' if filename_prefix else ''}{TOKENIZER_FILE}"
        )
        path.write_bytes(self.sp_model.serialized_model_proto())
        return (str(path),)

    def save_pretrained(  # type: ignore[override]  # the mixin's further options go through kwargs
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[str, ...]:
        """Writes `tokenizer.model`, and a `tokenizer_config.json` that any LlamaTokenizer reads."""
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
    # sentencepiece before 0.2.2 gives the same in this form, which later ones refuse.
    pieces = model.encode(text, out_type="immutable_proto").pieces
    return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


# ------------------------------------------------------------------ any tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """One piece of a prompt (between two images) → ids; nothing is added."""
    if isinstance(tokenizer, Owl2Tokenizer):
        return tokenizer.encode_exact(text)
    return (
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
    )


def encode_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Offsets]:
    """`encode`, and the (start, end) of each token's characters in `text`.

    Raises `InputError` for a tokenizer that cannot tell (neither SentencePiece nor a fast one).
    """
    if isinstance(tokenizer, Owl2Tokenizer):
        return tokenizer.encode_with_offsets(text)
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, so the "
            "words to learn cannot be marked. Use the fast version of this tokenizer (a "
            "tokenizer.json), or its tokenizer.model."
        )
    if not text:
        return [], []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What this tokenizer puts before a text: `[bos]`, or nothing (as GPT-2's kind).

    What it may put at the end is left out: the end of an answer is the chat template's.
    """
    if tokenizer.bos_token_id is None:
        return []
    if isinstance(tokenizer, Owl2Tokenizer):
        return [tokenizer.bos_token_id] if tokenizer.add_bos_token else []
    return (
        [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    )


# ------------------------------------------------------------------ a tokenizer of one's own


def train_tokenizer(texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int) -> int:
    """Trains a small SentencePiece model with LLaMA's conventions and writes it to `path` (a
    `tokenizer.model`).

    BPE with bytes for what it does not know, nothing normalised or stripped, digits apart, `<unk>`
    0, `<s>` 1, `</s>` 2. The same texts give the same file. `vocab_size`: at most this many pieces;
    few texts give fewer.

    Returns the number of pieces. Raises `InputError` without texts, or if `vocab_size` cannot hold
    the 259 pieces that are always there and the letters of `texts`.
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
        reason = f"these texts need {needed[1]} at least" if needed else str(error)
        raise InputError(
            f"No tokenizer with vocab_size {vocab_size} can be trained: {reason}. It must hold 259 "
            "pieces (3 control tokens, 256 bytes) and every letter of the texts, and there must be "
            "texts."
        ) from error
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.write_bytes(model.getvalue())
    unfinished.replace(target)
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # A line break is a byte piece in LLaMA's models, never part of a longer one.
    for text in texts:
        yield from filter(None, text.split("\n"))
