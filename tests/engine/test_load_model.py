"""Which device and dtype; what cannot be loaded (USERS 15)."""

import pytest
import torch

from owl2.engine.engine import Engine
from owl2.engine.load_model import load_model
from owl2.errors import InputError
from owl2.runtime import select_device, select_dtype


def test_the_fastest_device_there_is(monkeypatch):
    for cuda, mps, chosen in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert select_device() == torch.device(chosen)


@pytest.mark.parametrize(
    ("device", "bf16", "dtype"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", False, torch.float16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
    ],
)
def test_dtype_by_device(monkeypatch, device, bf16, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    assert select_dtype(torch.device(device)) == dtype
    assert select_dtype(torch.device(device), "float32") == torch.float32
    assert select_dtype(torch.device(device), torch.float16) == torch.float16


def test_a_dtype_may_be_asked_for(tiny_checkpoint, conversations):
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert {weight.dtype for weight in engine.model.parameters()} == {torch.bfloat16}
    assert engine.chat(conversations[2], max_new_tokens=3)
    assert engine.score(conversations[2], ["red"])[0] < 0


def test_processor_settings_are_handed_on(tiny_checkpoint):
    engine = Engine.from_pretrained(
        tiny_checkpoint, device="cpu", image_policy="pad", max_pixels=100
    )
    images = engine.processor.image_processor
    assert (images.policy, images.max_pixels) == ("pad", 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "abacus.*cuda, mps, cpu"),
        ({"device": "meta"}, "meta.*cuda, mps, cpu"),
        ({"device": "xla"}, "xla.*cuda, mps, cpu"),
        ({"device": "cpu", "dtype": "int3"}, "int3.*float32, bfloat16"),
        ({"device": "cpu", "attn_implementation": "magic"}, "magic"),
        ({"device": "cpu", "image_policy": "crop"}, "crop"),
    ],
)
def test_what_cannot_be_loaded(tiny_checkpoint, options, message):
    with pytest.raises(InputError, match=message):
        Engine.from_pretrained(tiny_checkpoint, **options)


def test_a_device_that_is_not_there(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'cuda' is not available"):
        Engine.from_pretrained(tiny_checkpoint, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="1 CUDA device"):
        select_device("cuda:1")


def test_a_device_without_a_driver(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def no_driver(self, device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.nn.Module, "to", no_driver)
    with pytest.raises(InputError, match="'cuda': no driver"):
        load_model(tiny_checkpoint, device="cuda", dtype="float32")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range(shared_engine, conversations, seed):
    with pytest.raises(InputError, match="seed"):
        shared_engine.chat(conversations[0], seed=seed, temperature=1.0)


def test_other_numbers_of_bits_are_refused(tiny_checkpoint):
    with pytest.raises(InputError, match="3bit"):
        load_model(tiny_checkpoint, "cpu", quantize="3bit")
