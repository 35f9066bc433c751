"""Code in an uploaded checkpoint that loads it where owl2 has not been imported.

transformers executes it with ``trust_remote_code=True``. It imports the package, or names it.
"""

from pathlib import Path

from owl2.checkpoints.config_file import CONFIG_FILE, read_json
from owl2.files import atomic_write_json

MODULE = "owl2_model"
CODE = '''"""Loads this model with the package owl2."""

try:
    from owl2 import Owl2Config, Owl2ForConditionalGeneration, Owl2Processor
except ImportError as error:
    raise ImportError("This model requires owl2: pip install owl2-vlm") from error
'''
AUTO_MAP = {
    "AutoConfig": "Owl2Config",
    "AutoProcessor": "Owl2Processor",
    "AutoModelForCausalLM": "Owl2ForConditionalGeneration",
    "AutoModelForImageTextToText": "Owl2ForConditionalGeneration",
    "AutoModelForMultimodalLM": "Owl2ForConditionalGeneration",
}


def add_remote_code(folder: Path) -> None:
    """Add the code to the checkpoint in `folder`, and the option ``auto_map`` to its config."""
    config = folder / CONFIG_FILE
    if not config.is_file():  # an adapter, which has no model class
        return
    auto_map = {auto_class: f"{MODULE}.{name}" for auto_class, name in AUTO_MAP.items()}
    atomic_write_json(config, read_json(config) | {"auto_map": auto_map})
    (folder / f"{MODULE}.py").write_text(CODE)
