"""The model of lm-eval: independent of the batch, with the ids and chat format of training."""

import sys

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.eval import lm_eval as command
from owl2.eval.adapters.lm_eval_model import LmEvalModel
from tests.errors import raises_input_error

PROMPTS = ["is it " * count + "yes" for count in (1, 5, 2, 3)]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


def ask(kind, model, pairs):
    requests = [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]
    return getattr(model, kind)(requests)


def test_likelihoods_equal_those_of_the_logits(engine):
    """In any batch."""
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in (" no", " a red circle")]
    together = ask("loglikelihood", LmEvalModel(engine, batch_size=8), pairs)
    alone = ask("loglikelihood", LmEvalModel(engine, batch_size=1), pairs)
    for (prompt, choice), (one, _), (other, _) in zip(pairs, together, alone, strict=True):
        before = engine.processor(text=prompt)["input_ids"][0]
        ids = engine.processor(text=prompt + choice, return_tensors="pt")["input_ids"]
        log_probabilities = engine.model(ids).logits[0].log_softmax(-1).detach()
        positions = range(len(before), ids.shape[1])
        expected = sum(float(log_probabilities[at - 1, ids[0, at]]) for at in positions)
        assert one == pytest.approx(expected, abs=1e-4)
        assert other == pytest.approx(expected, abs=1e-4)


def test_rolling_likelihoods_exceed_the_context(engine):
    model = LmEvalModel(engine, batch_size=2)
    texts = [("is it a red one? " * 30,), ("yes",)]
    assert len(model.tok_encode(texts[0][0])) > model.max_length == 128
    together = ask("loglikelihood_rolling", model, texts)
    alone = ask("loglikelihood_rolling", LmEvalModel(engine, batch_size=1), texts)
    assert together == pytest.approx(alone, abs=1e-3)
    assert together[0] < together[1] < 0


def test_generation_equals_that_of_the_engine(engine):
    settings = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    model = LmEvalModel(engine, batch_size=4)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    arguments = [(model.apply_chat_template(turn), settings) for turn in turns]
    together = ask("generate_until", model, arguments)
    assert together == ask("generate_until", LmEvalModel(engine, batch_size=1), arguments)
    expected = [engine.chat(turn, max_new_tokens=5).split("\n")[0] for turn in turns]
    assert [text.strip() for text in together] == [text.strip() for text in expected]


def test_one_start_token_and_a_copy_of_the_tokenizer(engine):
    start = engine.processor.tokenizer.bos_token_id
    model = LmEvalModel(engine)
    ids = model.tok_encode("yes no")
    assert ids == engine.processor(text="yes no")["input_ids"][0]
    assert ids.count(start) == 1
    assert model.tokenizer is not engine.processor.tokenizer


def test_chat_format(engine):
    model = LmEvalModel(engine)
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two?"},
    ]
    prompt = model.apply_chat_template(turns)
    assert prompt == "USER: one? ASSISTANT: yes</s>USER: two? ASSISTANT:"
    turns = [*turns, {"role": "assistant", "content": "an"}]
    assert model.apply_chat_template(turns, add_generation_prompt=False) == f"{prompt} an"
    assert model.chat_template(True) == engine.processor.chat_template
    assert model.chat_template(False) is None
    system = {"role": "system", "content": "be brief"}
    assert "be brief" in model.apply_chat_template([system, turns[0]])
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "'mine'"):
        model.chat_template("mine")


def test_option_after_a_chat_prompt_is_encoded_as_in_training(engine):
    """lm-eval adds no space; in training it is part of the first token of the answer."""
    model = LmEvalModel(engine)
    turns = [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "yes"}]
    inputs = engine.processor.for_training(turns)
    learned = inputs["input_ids"][0][inputs["labels"][0] != -100].tolist()
    prompt = model.apply_chat_template(turns[:1])
    for option in ("yes", " yes"):
        before, after = model._encode_pair(prompt, option)
        assert after == learned[:-1]  # less the end token
        assert [*before, *learned] == inputs["input_ids"][0].tolist()
    assert model._encode_pair("is it", "yes") != model._encode_pair("is it", " yes")


def test_unknown_arguments_are_an_error(tiny_checkpoint):
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "dytpe"):
        LmEvalModel(str(tiny_checkpoint), dytpe="float32")
    with pytest.raises(InputError) as error:
        LmEvalModel("/nowhere", device="cpu")
    assert "nowhere" in str(error.value)


def test_default_device_of_lm_eval_falls_back_to_an_available_one(tiny_checkpoint, monkeypatch):
    """The default of its command line is cuda:0."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert LmEvalModel(str(tiny_checkpoint), device="cuda:0").device.type in ("cpu", "mps")
    with raises_input_error(ErrorCode.UNSUPPORTED, "cuda:1"):
        LmEvalModel(str(tiny_checkpoint), device="cuda:1")


def test_command_line_has_both_models(monkeypatch, capsys):
    def evaluate():
        assert get_model("owl2") is LmEvalModel
        assert get_model("hf") is not LmEvalModel
        raise InputError("wrong", ErrorCode.INVALID_VALUE)

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_missing_lm_eval_exits_with_2(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert "pip install 'owl2-vlm[eval]'" in capsys.readouterr().err
