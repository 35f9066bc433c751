"""lm-eval's model: any batch the same, ids as in training, the checkpoint's chat format."""

import sys

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval import lm_eval as front
from owl2.eval.adapters.lm_eval_model import Owl2Text

PROMPTS = ["is it " * count + "yes" for count in (1, 5, 2, 3)]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


def ask(kind, model, arguments):
    requests = [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]
    return getattr(model, kind)(requests)


def test_likelihoods_are_the_models_own(engine):
    """Against the logits themselves; none depends on its batch."""
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in (" no", " a red circle")]
    together = ask("loglikelihood", Owl2Text(engine, batch_size=8), pairs)
    alone = ask("loglikelihood", Owl2Text(engine, batch_size=1), pairs)
    for (prompt, choice), (one, _), (other, _) in zip(pairs, together, alone, strict=True):
        before = engine.processor(text=prompt)["input_ids"][0]
        whole = engine.processor(text=prompt + choice, return_tensors="pt")["input_ids"]
        log_probabilities = engine.model(whole).logits[0].log_softmax(-1).detach()
        places = range(len(before), whole.shape[1])
        expected = sum(float(log_probabilities[at - 1, whole[0, at]]) for at in places)
        assert one == pytest.approx(expected, abs=1e-4)
        assert other == pytest.approx(expected, abs=1e-4)


def test_rolling_likelihoods_go_beyond_the_context(engine):
    model = Owl2Text(engine, batch_size=2)
    texts = [("is it a red one? " * 30,), ("yes",)]
    assert len(model.tok_encode(texts[0][0])) > model.max_length == 128
    together = ask("loglikelihood_rolling", model, texts)
    alone = ask("loglikelihood_rolling", Owl2Text(engine, batch_size=1), texts)
    assert together == pytest.approx(alone, abs=1e-3)
    assert together[0] < together[1] < 0


def test_generation_is_the_engines(engine):
    """`engine.chat` writes the same after the chat format as lm-eval does after our prompt."""
    settings = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    model = Owl2Text(engine, batch_size=4)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    asked = [(model.apply_chat_template(turn), settings) for turn in turns]
    together = ask("generate_until", model, asked)
    assert together == ask("generate_until", Owl2Text(engine, batch_size=1), asked)
    expected = [engine.chat(turn, max_new_tokens=5).split("\n")[0] for turn in turns]
    assert [text.strip() for text in together] == [text.strip() for text in expected]


def test_one_start_token_and_the_engines_tokenizer_is_left_alone(engine):
    start = engine.processor.tokenizer.bos_token_id
    model = Owl2Text(engine)
    ids = model.tok_encode("yes no")
    assert ids == engine.processor(text="yes no")["input_ids"][0]
    assert ids.count(start) == 1
    assert model.tokenizer is not engine.processor.tokenizer


def test_the_chat_format(engine):
    model = Owl2Text(engine)
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
    with pytest.raises(InputError, match="no system prompt"):
        model.apply_chat_template([{"role": "system", "content": "be brief"}, turns[0]])
    with pytest.raises(InputError, match="no chat template 'mine'"):
        model.chat_template("mine")


def test_an_option_after_a_chat_prompt_is_encoded_as_in_training(engine):
    """lm-eval puts no space before it; training has one, which is part of its first token."""
    model = Owl2Text(engine)
    turns = [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "yes"}]
    inputs = engine.processor.for_training(turns)
    learned = inputs["input_ids"][0][inputs["labels"][0] != -100].tolist()
    prompt = model.apply_chat_template(turns[:1])
    for option in ("yes", " yes"):
        before, after = model._encode_pair(prompt, option)
        assert after == learned[:-1]  # less the end token
        assert [*before, *learned] == inputs["input_ids"][0].tolist()
    assert model._encode_pair("is it", "yes") != model._encode_pair("is it", " yes")


def test_arguments_that_there_are_not(tiny_checkpoint):
    with pytest.raises(InputError, match="there is no dytpe"):
        Owl2Text(str(tiny_checkpoint), dytpe="float32")
    with pytest.raises(InputError, match="nowhere"):
        Owl2Text("/nowhere", device="cpu")


def test_lm_evals_own_default_device_is_what_there_is(tiny_checkpoint, monkeypatch):
    """Its command line says cuda:0 where the user says nothing."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Owl2Text(str(tiny_checkpoint), device="cuda:0").device.type in ("cpu", "mps")
    with pytest.raises(InputError, match="cuda:1"):
        Owl2Text(str(tiny_checkpoint), device="cuda:1")


def test_the_front_door_knows_both_models(monkeypatch, capsys):
    def evaluate():
        assert get_model("owl2") is Owl2Text
        assert get_model("hf") is not Owl2Text
        raise InputError("wrong")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    with pytest.raises(SystemExit) as end:
        front.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_without_lm_eval(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as end:
        front.main()
    assert end.value.code == 2
    assert "pip install 'owl2-vlm[eval]'" in capsys.readouterr().err
