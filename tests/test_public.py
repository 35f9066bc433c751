"""The public names, and what importing the package registers."""

import shutil
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

import owl2


def test_public_names():
    names = {"Engine", "Owl2Config", "Owl2ForConditionalGeneration", "Owl2Processor"}
    assert names <= set(owl2.__all__)
    assert all(hasattr(owl2, name) for name in owl2.__all__)


def test_auto_classes_load_owl2_classes(tiny_checkpoint):
    assert type(AutoConfig.from_pretrained(tiny_checkpoint)) is owl2.Owl2Config
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(processor) is owl2.Owl2Processor
    assert processor.num_image_tokens == 3
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    assert type(model) is owl2.Owl2ForConditionalGeneration


def test_released_checkpoint_without_processor_class(tiny_checkpoint, tmp_path):
    released = tmp_path / "released"
    shutil.copytree(tiny_checkpoint, released)
    (released / "processor_config.json").unlink()
    (released / "chat_template.jinja").unlink()
    assert type(AutoProcessor.from_pretrained(released)) is owl2.Owl2Processor


@pytest.mark.parametrize("source", ["objects", "directory"])
def test_transformers_pipeline(tiny_checkpoint, source):
    if source == "objects":
        parts = {
            "model": owl2.Owl2ForConditionalGeneration.from_pretrained(tiny_checkpoint),
            "processor": owl2.Owl2Processor.from_pretrained(tiny_checkpoint),
        }
    else:
        parts = {"model": str(tiny_checkpoint)}
    chat = pipeline("image-text-to-text", **parts)
    content = [{"type": "image", "image": Image.new("RGB", (9, 5))}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    options = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}}
    (answer,) = chat(text=messages, return_full_text=False, **options)
    inputs = chat.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    expected = chat.processor.decode(output[0, prompt:], skip_special_tokens=True)
    assert expected and answer["generated_text"] == expected


# One process, because it takes seconds to start. It has no other order of imports: owl2 imports
# transformers before it registers its classes.
CODE = """import sys, owl2
optional = ["easy_vqa", "matplotlib", "peft", "pydantic", "typer"]
assert not {*optional} & sys.modules.keys()
from owl2.eval.listing import print_tasks
from rich.console import Console
print_tasks(None, Console(stderr=True))
assert not {"lm_eval", "lmms_eval", "pycocoevalcap", "matplotlib"} & sys.modules.keys()
import transformers
"""


def test_import_registers_auto_classes_and_loads_no_optional_library(tiny_checkpoint):
    auto_classes = ["AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"]
    code = f"""{CODE}
for name in {auto_classes}:
    print(type(getattr(transformers, name).from_pretrained({str(tiny_checkpoint)!r})).__module__)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    modules = result.stdout.split()
    assert len(modules) == 3, result.stderr
    assert all(module.startswith("owl2.") for module in modules)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "stdout", "stderr"),
    [
        (["--help"], 0, "Usage: owl2", ""),
        (["--version"], 0, f"owl2 {owl2.__version__}\n", ""),
        (["no-such-command"], 2, "", "no-such-command"),
    ],
)
def test_python_m_owl2_imports_no_heavy_library(arguments, exit_code, stdout, stderr):
    command = [sys.executable, "-X", "importtime", "-m", "owl2", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == exit_code
    assert stdout in result.stdout and bool(stdout) == bool(result.stdout)
    assert stderr in result.stderr and "Traceback" not in result.stderr
    lines = (line for line in result.stderr.splitlines() if line.startswith("import time:"))
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "peft", "matplotlib", "numpy"}
