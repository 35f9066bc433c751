"""Devices and dtypes; checkpoints and options that cannot be loaded."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode
from owl2.processing.processor import Owl2Processor
from owl2.runtime import multiplies_in_float32, select_device, select_dtype
from owl2.train.adapters import apply_lora
from owl2.train.recipe_sections import LoraSettings
from tests.engine.conftest import ask
from tests.errors import raises_input_error


def test_the_default_device_is_the_fastest(monkeypatch):
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
def test_the_default_dtype_of_a_device(monkeypatch, cpu_capabilities, device, bf16, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    cpu_capabilities(avx512_bf16=bf16)
    assert select_dtype(torch.device(device)) == dtype
    assert select_dtype(torch.device(device), "float32") == torch.float32
    assert select_dtype(torch.device(device), torch.float16) == torch.float16


@pytest.mark.parametrize(
    ("machine", "capabilities", "dtype", "is_slow"),
    [
        ("x86_64", {"avx512_bf16": True}, torch.float16, True),
        ("x86_64", {"avx512_bf16": True}, torch.bfloat16, False),
        ("x86_64", {"avx512_fp16": True}, torch.float16, False),
        ("x86_64", {"avx512_fp16": True}, torch.bfloat16, True),
        ("aarch64", {}, torch.float16, False),
        ("x86_64", {}, torch.float32, False),
    ],
)
def test_where_products_are_in_float32(
    monkeypatch, cpu_capabilities, machine, capabilities, dtype, is_slow
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    cpu_capabilities(**capabilities)
    x = torch.zeros(1, dtype=dtype)
    with torch.no_grad():
        assert multiplies_in_float32(x) == is_slow
    assert not multiplies_in_float32(x)


def test_a_requested_dtype(tiny_checkpoint, conversations):
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert {weight.dtype for weight in engine.model.parameters()} == {torch.bfloat16}
    assert engine.chat(conversations[2], max_new_tokens=3)
    assert engine.score(conversations[2], ["red"])[0] < 0


def test_processor_options(tiny_checkpoint):
    engine = Engine.from_pretrained(
        tiny_checkpoint, device="cpu", image_policy="pad", max_pixels=100
    )
    images = engine.processor.image_processor
    assert (images.image_policy, images.max_pixels) == ("pad", 100)


@pytest.fixture(scope="module")
def moved(tiny_checkpoint, tmp_path_factory):
    """A directory with an adapter, its base model, which the adapter does not find, and inputs."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(tiny_checkpoint, folder / "base")
    model = ModelArgs(folder / "base", "cpu", "float32").load_model()
    apply_lora(model, LoraSettings(r=2), seed=0)
    Owl2Processor.from_pretrained(tiny_checkpoint).save_pretrained(folder / "adapter")
    model.save_pretrained(folder / "adapter")
    (folder / "base").rename(folder / "moved")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "a.png")
    (folder / "q.jsonl").write_text('{"question": "what?", "answer": "red"}')
    return folder


def test_answer_with_a_moved_base_model(run_cli, moved):
    options = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", 4)
    result = run_cli("chat", "--model", moved / "adapter", "--base", moved / "moved", *options, "a")
    engine = Engine.from_pretrained(moved / "adapter", "cpu", "float32", base=moved / "moved")
    assert result.stdout.strip() == engine.chat(ask("a"), max_new_tokens=4)


@pytest.mark.parametrize(
    "command",
    [
        "chat what? --model {adapter} --max-new-tokens 1",
        "caption {images} --model {adapter} --output-file {out}/a.jsonl --max-new-tokens 1",
        "eval --model {adapter} --tasks {q} --output {out} --max-new-tokens 1",
        pytest.param(  # draws figures
            "attend what? --model {adapter} --output {out} --max-new-tokens 1",
            marks=pytest.mark.slow,
        ),
        "merge {adapter} --output {out}",
        "serve --model {adapter} --port 0",
        "web --model {adapter} --port 0",
    ],
)
def test_every_command_accepts_a_moved_base_model(run_cli, monkeypatch, moved, tmp_path, command):
    def serve_until_signal(server, *_):
        return 0

    monkeypatch.setattr("owl2.serve.launch.Server.serve_until_signal", serve_until_signal)
    page = SimpleNamespace(mount=lambda *_, **options: None)
    monkeypatch.setitem(sys.modules, "owl2.serve.web.mount", page)
    files = {name: moved / name for name in ("adapter", "images")}
    words = command.format(**files, q=moved / "q.jsonl", out=tmp_path / "out").split()
    refused = run_cli(*words)
    assert (refused.exit_code, "--base" in refused.stderr) == (2, True)
    accepted = run_cli(*words, "--base", moved / "moved")
    assert accepted.exit_code == 0, accepted.stderr


@pytest.mark.parametrize(
    ("options", "code", "needle"),
    [
        ({"device": "abacus"}, ErrorCode.UNSUPPORTED, "abacus"),
        ({"device": "meta"}, ErrorCode.UNSUPPORTED, "meta"),
        ({"device": "xla"}, ErrorCode.UNSUPPORTED, "xla"),
        ({"device": "cpu", "dtype": "int3"}, ErrorCode.UNKNOWN_NAME, "int3"),
        ({"device": "cpu", "attn_implementation": "magic"}, ErrorCode.UNSUPPORTED, "magic"),
        ({"device": "cpu", "quantize": "3bit"}, ErrorCode.UNKNOWN_NAME, "3bit"),
        ({"device": "cpu", "activation_bits": 4}, ErrorCode.INVALID_VALUE, "4"),
        ({"device": "cpu", "image_policy": "stretch"}, ErrorCode.INVALID_VALUE, "stretch"),
    ],
)
def test_options_that_cannot_be_loaded(tiny_checkpoint, options, code, needle):
    with raises_input_error(code, needle):
        Engine.from_pretrained(tiny_checkpoint, **options)


def test_unavailable_devices(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with raises_input_error(ErrorCode.UNSUPPORTED, "'cuda'"):
        Engine.from_pretrained(tiny_checkpoint, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with raises_input_error(ErrorCode.UNSUPPORTED, "cuda:1"):
        select_device("cuda:1")


def test_a_device_without_a_driver(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def fail(self, device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with raises_input_error(ErrorCode.UNSUPPORTED, "'cuda'", "no driver"):
        ModelArgs(tiny_checkpoint, device="cuda", dtype="float32").load_model()
