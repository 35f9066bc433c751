"""Labels are exactly the answers and their end tokens, for all tokenizers and templates."""

from owl2.errors import ErrorCode
from owl2.processing.loss_mask import encode_with_loss_mask
from owl2.processing.tokenizer import Owl2Tokenizer, encode, train_tokenizer
from tests.errors import raises_input_error

IMAGE = [9999] * 3


def spans_of(text: str, *parts: str) -> list[tuple[int, int]]:
    return [(text.index(part), text.index(part) + len(part)) for part in parts]


def test_segments_between_images_are_tokenized_separately(llama):
    text = "a <|image|><|image|> b c</s>"
    sample = encode_with_loss_mask(llama, text, spans_of(text, " c</s>"), [1], IMAGE)
    expected = [1, *encode(llama, "a "), *IMAGE, *IMAGE, *encode(llama, " b c</s>")]
    assert sample.ids == expected
    learned = [
        id_ for id_, is_learned in zip(sample.ids, sample.loss_mask, strict=True) if is_learned
    ]
    assert llama.decode(learned) == "c</s>"


def test_bos_in_the_text_is_not_repeated(llama):
    assert encode_with_loss_mask(llama, "<s>a", [], [1], IMAGE).ids == [1, *encode(llama, "a")]
    assert encode_with_loss_mask(llama, "<|image|>a", [], [1], IMAGE).ids[:4] == [1, *IMAGE]


def test_answer_of_byte_tokens_after_a_control_token(llama):
    text = "a</s>🦉</s>"
    sample = encode_with_loss_mask(llama, text, spans_of(text, "🦉</s>"), [1], IMAGE)
    learned = [
        id_ for id_, is_learned in zip(sample.ids, sample.loss_mask, strict=True) if is_learned
    ]
    assert learned == encode(llama, "🦉</s>")  # its "▁" too, which the model will have to say


def test_token_across_an_answer_border_is_split_as_in_inference(byte_level):
    text = "a\n\n\nb<|im_end|>\n"
    assert byte_level.tokenize(text)[1] == "ĊĊ"  # else this tests nothing
    sample = encode_with_loss_mask(byte_level, text, spans_of(text, "\n\nb<|im_end|>"), [], IMAGE)
    prompt = encode(byte_level, "a\n")
    assert sample.ids[: len(prompt)] == prompt and not any(sample.loss_mask[: len(prompt)])
    learned = [
        id_ for id_, is_learned in zip(sample.ids, sample.loss_mask, strict=True) if is_learned
    ]
    assert byte_level.decode(learned) == "\n\nb<|im_end|>"


def test_sentencepiece_cannot_be_cut_inside_a_word(tmp_path):
    train_tokenizer(["abab abab abab"], tmp_path / "m", 300)
    tokenizer = Owl2Tokenizer(tmp_path / "m")
    assert len(encode(tokenizer, "abab")) == 1
    with raises_input_error(ErrorCode.INVALID_FORMAT, "'abab'"):
        encode_with_loss_mask(tokenizer, "abab", [(2, 4)], [1], IMAGE)
