"""The public names, and what importing the package registers."""

import shutil
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

import owl2


def test_the_public_names():
    names = {"Engine", "Owl2Config", "Owl2ForConditionalGeneration", "Owl2Processor"}
    assert names <= set(owl2.__all__)
    assert all(hasattr(owl2, name) for name in owl2.__all__)


def test_auto_classes_find_ours(tiny_checkpoint):
    assert type(AutoConfig.from_pretrained(tiny_checkpoint)) is owl2.Owl2Config
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(processor) is owl2.Owl2Processor
    assert processor.num_image_tokens == 3
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    assert type(model) is owl2.Owl2ForConditionalGeneration


def test_a_released_checkpoint_names_no_processor_and_gets_ours(tiny_checkpoint, tmp_path):
    released = tmp_path / "released"
    shutil.copytree(tiny_checkpoint, released)
    (released / "processor_config.json").unlink()
    (released / "chat_template.jinja").unlink()
    assert type(AutoProcessor.from_pretrained(released)) is owl2.Owl2Processor


@pytest.mark.parametrize("given", ["objects", "a directory"])
def test_transformers_pipeline(tiny_checkpoint, given):
    if given == "objects":
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
    said = chat.processor.decode(output[0, prompt:], skip_special_tokens=True)
    assert said and answer["generated_text"] == said


@pytest.mark.parametrize("first", ["import owl2, transformers", "import transformers, owl2"])
@pytest.mark.parametrize(
    "auto_class", ["AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"]
)
def test_auto_classes_find_owl2_in_any_import_order(tiny_checkpoint, first, auto_class):
    code = f"{first}; print(type(transformers.{auto_class}.from_pretrained('{tiny_checkpoint}')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "owl2." in result.stdout, result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_the_command_line_imports_nothing_heavy(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "owl2", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = (line for line in result.stderr.splitlines() if line.startswith("import time:"))
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "peft", "matplotlib", "numpy"}


def test_importing_the_package_imports_nothing_unused():
    heavy = ["easy_vqa", "matplotlib", "peft", "pydantic", "typer"]
    code = f"import sys, owl2; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
