"""Adapters beside one base model: each answers as its merged model does, also in one batch."""

import json
import shutil
from functools import partial

import pytest
import torch
from PIL import Image

from owl2.engine.backends import cpu
from owl2.engine.engine import Engine
from owl2.engine.lora import LoraManager, find_adapters
from owl2.engine.model_runner import ModelRunner, NewTokens
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.adapters import load, make_adapter, merged_model
from tests.engine.conftest import ask, random_image
from tests.errors import raises_input_error
from tests.family import FOLDER, SIBLINGS

# Adapters of different ranks and parts; "vision" also has its own abstractor.
SETTINGS = {
    "decoder": {"r": 4, "parts": ["decoder"]},
    "keys": {"r": 2, "parts": ["decoder"], "target_modules": ["k_proj", "multiway.1.v_proj"]},
    "vision": {"r": 3, "parts": ["decoder", "vision"], "modules_to_save": ["abstractor"]},
}
NAMES = [None, *SETTINGS]


@pytest.fixture(scope="session")
def folders(tiny_checkpoint, tmp_path_factory):
    """The directories of three adapters of the tiny model."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(tiny_checkpoint, root / name, seed, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items(), 1)
    }


@pytest.fixture(scope="session")
def merged(tiny_checkpoint, folders, shared_engine):
    """Engines of the merged models by the names of the adapters, and of the base model."""
    processor = shared_engine.processor
    models = {name: merged_model(tiny_checkpoint, one) for name, one in folders.items()}
    return {None: shared_engine} | {name: Engine(one, processor) for name, one in models.items()}


@pytest.fixture(scope="session")
def served(tiny_checkpoint, folders):
    return Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", adapters=folders)


@pytest.fixture(params=[True, False], ids=["kernels", "model"])
def use_kernels(request, monkeypatch):
    """With the CPU kernels, and with the model's own forward as on other devices."""
    if not request.param:
        monkeypatch.setattr(cpu, "supports", lambda model: False)
    return request.param


def last_logits(engine, messages, adapter):
    prompt = engine.encode(messages, adapter=adapter)
    return engine.run_prefilled(prompt, lambda output: output.logits[0])


def test_logits_of_each_adapter_are_those_of_its_merged_model(served, merged, conversations):
    found = {}
    for name in NAMES:
        for messages in conversations[:3]:
            expected = last_logits(merged[name], messages, None)
            logits = last_logits(served, messages, name)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        found[name] = logits
    for name in SETTINGS:
        assert (found[name] - found[None]).abs().max() > 0.05


def test_one_batch_mixes_adapters_and_the_base_model(
    tiny_checkpoint, folders, merged, conversations, use_kernels, batch_sizes
):
    """Prompts with and without images, in one batch, equal the answers of the merged models.

    They are computed in chunks, which begin and end inside images.
    """
    options = {"max_num_batched_tokens": 64, "adapters": folders}
    served = Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", **options)
    prompts = [messages for messages in conversations for _ in NAMES]
    names = NAMES * len(conversations)
    del batch_sizes[:]
    answers = served.batch(prompts, names, max_new_tokens=12)
    assert max(batch_sizes) > len(NAMES)
    assert batch_sizes[-1] <= len(prompts)
    for name in NAMES:
        own = [answer for answer, one in zip(answers, names, strict=True) if one == name]
        assert own == merged[name].batch(conversations, max_new_tokens=12)
    assert len({tuple(answers[index :: len(NAMES)]) for index in range(len(NAMES))}) == len(NAMES)


def test_image_token_beside_a_step_of_another_adapter(tiny_checkpoint, folders, use_kernels):
    """A chunk of a prompt can be a single image token, which passes through other modules."""
    model = load(tiny_checkpoint)
    image, width = model.config.image_token_id, model.config.hidden_size
    embeddings = torch.randn(1, width, generator=torch.manual_seed(0))
    tokens = [NewTokens(0, 0, (5,), adapter="decoder"), NewTokens(1, 0, (image,), embeddings)]
    new = partial(ModelRunner, model, LoraManager(model, find_adapters(folders)))
    alone = torch.cat([new().forward([one._replace(row=0)]) for one in tokens])
    torch.testing.assert_close(new().forward(tokens), alone, rtol=0, atol=1e-4)


def test_streams_choices_and_logits(served, merged, conversations):
    messages = conversations[1]
    prompts = [served.encode(one, adapter=name) for one in conversations for name in NAMES]
    ids = [5, 9, 17]
    logits = served.next_token_logits(prompts, ids)
    for index, name in enumerate(NAMES):
        options = {"max_new_tokens": 9}
        text = merged[name].chat(messages, **options)
        assert "".join(served.stream(messages, adapter=name, **options)) == text
        [completion] = served.complete(messages, adapter=name, **options).outputs()
        assert completion.text == text
        scores = served.score(messages, ["red", "a blue circle"], adapter=name)
        expected = merged[name].score(messages, ["red", "a blue circle"])
        assert scores == pytest.approx(expected, abs=1e-3)
        expected = merged[name].next_token_logits([*map(merged[name].encode, conversations)], ids)
        torch.testing.assert_close(logits[index :: len(NAMES)], expected, rtol=0, atol=1e-3)
    assert served.chat(prompts[2], max_new_tokens=9) == merged["keys"].chat(
        conversations[0], max_new_tokens=9
    )


def test_caches_are_not_shared(tiny_checkpoint, folders, merged):
    """The same question: each adapter computes its own keys, values and image embeddings once."""
    engine = Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", adapters=folders)
    messages = ask("is it red? " * 8, random_image(3))
    length = len(engine.encode(messages).ids)
    for is_cached in (False, True):
        for name in (*NAMES, *reversed(NAMES)):
            before = engine.stats()
            assert engine.chat(messages, adapter=name, max_new_tokens=4) == (
                merged[name].chat(messages, max_new_tokens=4)
            )
            after = engine.stats()
            new_tokens = after.num_prefill_tokens - before.num_prefill_tokens
            new_images = after.num_encoded_images - before.num_encoded_images
            assert (new_tokens, new_images) == ((1, 0) if is_cached else (length, 1))
            is_cached |= name == NAMES[-1]


@pytest.mark.parametrize("adapter", NAMES)
def test_decode_steps_are_one_call_for_all_layers(served, monkeypatch, adapter):
    calls = []
    decoder_layers = cpu.ops.decoder_layers
    monkeypatch.setattr(
        cpu.ops, "decoder_layers", lambda *args: (calls.append(1), decoder_layers(*args))
    )
    if not cpu.supports(served.model):  # no compiler on this machine
        return
    served.chat(ask("no"), adapter=adapter, max_new_tokens=5)
    assert len(calls) >= 4


@pytest.mark.parametrize("dtype", cpu.ops.DTYPES)
def test_one_call_for_all_layers_equals_the_operations(
    tiny_checkpoint, folders, tmp_path, monkeypatch, dtype
):
    """Logits of a mixed batch; a token has the same values alone and in the batch."""
    wide = make_adapter(tiny_checkpoint, tmp_path / "wide", 5, r=19, parts=["decoder"])
    model = load(tiny_checkpoint).to(dtype).eval()
    runner = ModelRunner(model, LoraManager(model, find_adapters(folders | {"wide": wide})))
    if not runner.uses_cpu_kernels:
        return
    names = ["decoder", None, "keys", "vision", "decoder", "wide"]

    def decode(chosen):
        tokens = [NewTokens(row, 0, (7 + row,), adapter=names[row]) for row in chosen]
        return runner.forward(tokens)

    together = decode(range(6))
    for row in range(6):
        assert torch.equal(decode([row])[0], together[row])
    monkeypatch.setattr(cpu, "_is_supported", lambda *args, **options: False)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(together, decode(range(6)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantized_base(tiny_checkpoint, folders, conversations, quantize):
    options = {"device": "cpu", "dtype": "float32", "quantize": quantize}
    served = Engine.from_pretrained(tiny_checkpoint, adapters=folders, **options)
    for name, folder in folders.items():
        alone = Engine.from_pretrained(folder, base=tiny_checkpoint, **options)
        for messages in conversations[:2]:
            expected = last_logits(alone, messages, None)
            torch.testing.assert_close(
                last_logits(served, messages, name), expected, rtol=0, atol=1e-4
            )
    answers = served.batch([conversations[1]] * 2, ["decoder", None], max_new_tokens=8)
    expected = [served.chat(conversations[1], one, max_new_tokens=8) for one in ("decoder", None)]
    assert answers == expected


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_siblings(sibling, tmp_path):
    base = FOLDER / sibling / "model"
    folder = make_adapter(base, tmp_path / "adapter", 1, parts=["decoder", "vision"], r=2)
    served = Engine.from_pretrained(base, "cpu", "float32", adapters={"one": folder})
    merged = Engine(merged_model(base, folder), served.processor)
    base_engine = Engine.from_pretrained(base, "cpu", "float32")
    prompts = [ask(text, random_image(index)) for index, text in enumerate(["red?", "a circle?"])]
    answers = served.batch(prompts * 2, ["one", "one", None, None], max_new_tokens=6)
    assert answers[:2] == merged.batch(prompts, max_new_tokens=6)
    assert answers[2:] == base_engine.batch(prompts, max_new_tokens=6)
    for engine, name in ((merged, "one"), (base_engine, None)):
        logits = last_logits(served, prompts[0], name)
        expected = last_logits(engine, prompts[0], None)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


def test_processor_of_an_adapter(tiny_checkpoint, folders, merged, tmp_path):
    """An adapter that was trained with padded images gets padded images."""
    folder = shutil.copytree(folders["decoder"], tmp_path / "padded")
    processor = merged[None].processor
    padded = processor.image_processor.replace(image_policy="pad")
    other = type(processor).from_pretrained(tiny_checkpoint)
    other.image_processor = padded
    other.save_pretrained(folder)
    served = Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", adapters={"padded": folder})
    messages = ask("red?", Image.new("RGB", (40, 10), "red"))
    prompt = served.encode(messages, adapter="padded")
    assert torch.equal(prompt.pixel_values, other.encode(messages).pixel_values)
    assert not torch.equal(prompt.pixel_values, processor.encode(messages).pixel_values)
    expected = last_logits(merged["decoder"], other.encode(messages), None)
    logits = last_logits(served, messages, "padded")
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def change_config(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(config | changes), encoding="utf-8")

    return change


def other_size(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["visual_config"]["visual_model"]["image_size"] = 16
    file.write_text(json.dumps(config), encoding="utf-8")


def other_base(folder):
    (folder / "base.json").write_text('{"fingerprint": "0"}', encoding="utf-8")


def remove_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def remove_config(folder):
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "code", "needle"),
    [
        (change_config(use_dora=True), ErrorCode.UNSUPPORTED, "use_dora"),
        (change_config(bias="all"), ErrorCode.UNSUPPORTED, "bias"),
        (change_config(modules_to_save=["lm_head"]), ErrorCode.UNSUPPORTED, "lm_head"),
        (change_config(target_modules=["lm_head", "q_proj"]), ErrorCode.MISSING_WEIGHTS, "lm_head"),
        (change_config(target_modules=["q_proj"]), ErrorCode.UNEXPECTED_WEIGHTS, "k_proj"),
        (change_config(r=5), ErrorCode.SHAPE_MISMATCH, "(5, 16)"),
        (change_config(target_modules=["none"]), ErrorCode.BASE_MODEL_MISMATCH, "none"),
        (change_config(peft_type="IA3"), ErrorCode.UNSUPPORTED, "IA3"),
        (other_size, ErrorCode.UNSUPPORTED, "owl2 merge"),
        (other_base, ErrorCode.BASE_MODEL_MISMATCH, "base.json"),
        (remove_weights, ErrorCode.MISSING_WEIGHTS, "adapter_model.safetensors"),
        (remove_config, ErrorCode.FILE_NOT_FOUND, "adapter_config.json"),
    ],
)
def test_adapters_are_checked_before_weights_are_read(
    tiny_checkpoint, folders, tmp_path, monkeypatch, change, code, needle
):
    folder = shutil.copytree(folders["decoder"], tmp_path / "adapter")
    change(folder)
    adapters = {"good": folders["keys"], "bad": folder}
    with raises_input_error(code, "bad", needle):
        LoraManager(load(tiny_checkpoint), find_adapters(adapters))
    monkeypatch.setattr(Owl2ForConditionalGeneration, "from_pretrained", None)  # fails if called
    with raises_input_error(code, "bad", needle):
        Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", adapters=adapters)


def test_lora_on_the_head_is_rejected(tiny_checkpoint, tmp_path):
    from peft import LoraConfig

    from owl2.checkpoints.adapters import add_lora

    model = load(tiny_checkpoint)
    add_lora(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    model.save_pretrained(tmp_path)
    with raises_input_error(ErrorCode.UNSUPPORTED, "lm_head", "owl2 merge"):
        Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", adapters={"head": tmp_path})


def test_adapter_as_base_and_unknown_names_are_rejected(served, folders, tiny_checkpoint):
    with raises_input_error(ErrorCode.CONFLICT, "owl2 merge"):
        Engine.from_pretrained(folders["keys"], base=tiny_checkpoint, adapters=folders)
    with raises_input_error(ErrorCode.CONFLICT, "owl2 merge"):
        LoraManager(load(folders["keys"], base=tiny_checkpoint), find_adapters(folders))
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "other", "decoder, keys, vision"):
        served.chat(ask("no"), adapter="other")
    with raises_input_error(ErrorCode.INVALID_VALUE, "1", "2"):
        served.batch([ask("no")] * 2, ["keys"])


def test_errors_end_only_their_request(served, merged):
    """An aborted request of one adapter does not change the others."""
    stream = served.stream(ask("what is this?"), adapter="keys", max_new_tokens=50)
    next(stream)
    stream.close()
    assert served.chat(ask("no"), max_new_tokens=5) == merged[None].chat(
        ask("no"), max_new_tokens=5
    )
