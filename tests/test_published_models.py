"""The checkpoints of docs/models.md: recognized by their configuration, and refused elsewhere.

The configurations are those of the golden checkpoints, which have the published keys.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from owl2.cli.info import size_table
from owl2.errors import ErrorCode
from owl2.processing.processor import Owl2Processor
from owl2.scoring.methods import CHECKPOINTS, check_answers
from tests.errors import raises_input_error
from tests.family import FOLDER

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
# Parts of hub ids and the golden checkpoint with their configuration; the first one applies.
GOLDEN = {
    "DocOwl2": "docowl2",
    "DocOwl1.5": "docowl1_5",
    "mplug_owl_2_1": "mplug_owl2_1",
    "mPLUG-Owl2.1": "mplug_owl2_1",
    "co-instruct": "co_instruct",
    "Compare2Score": "compare2score",
    "DeQA": "deqa_score",
    "": "one_align",
}
TITLES = {"docowl2": "DocOwl2", "docowl1_5": "DocOwl1.5", "mplug_owl2_1": "mPLUG-Owl2.1"}


def published_ids():
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    cells = [row.split(" | ")[0] for row in rows]
    return [name for cell in cells for name in re.findall(r"`([\w-]+/[\w.-]+)`", cell)]


IDS = published_ids()
ADAPTER = FOLDER / "q_align_lora" / "adapter"  # its base is q-future/one-align


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with the name and the configuration of a published checkpoint."""

    def write(name):
        golden = golden_of(name)
        folder = tmp_path / name.split("/")[-1]
        folder.mkdir()
        config = json.loads((FOLDER / golden / "model" / "config.json").read_text("utf-8"))
        if golden == "one_align":
            config["_name_or_path"] = name
        (folder / "config.json").write_text(json.dumps(config))
        if "LoRA" in name:
            for file in ("adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"):
                shutil.copyfile(ADAPTER / file, folder / file)
        return folder

    return write


def golden_of(name):
    return next(folder for part, folder in GOLDEN.items() if part in name)


def cells(folder):
    parts, values, remarks = size_table(str(folder)).columns
    rows = zip(parts.cells, values.cells, remarks.cells, strict=True)
    return {part: (value, remark) for part, value, remark in rows}


def test_the_page_has_all_scoring_models():
    assert len(IDS) > 15
    assert {"zhiyuanyou/DeQA-Score-LoRA-Mix3", "iic/mPLUG-Owl2", "iic/mPLUG-Owl2.1"} <= {*IDS}
    assert set(CHECKPOINTS) - {"teowu/mplug_owl2_7b_448_qinstruct_preview_v0.2"} <= {
        *published_ids()
    }


@pytest.mark.parametrize("name", IDS)
def test_info_recognizes_the_configuration(name, checkpoint):
    folder = checkpoint(name)
    golden = golden_of(name)
    assert size_table(str(folder)).title.endswith(TITLES.get(golden, "mPLUG-Owl2"))
    found = cells(folder)
    command, remark = found["use with"]
    assert ("owl2 rate" in command) == (name in CHECKPOINTS)
    assert ("owl2 chat" in command) == (name not in CHECKPOINTS or CHECKPOINTS[name].answers)
    assert name.split("/")[-1] in remark or name not in CHECKPOINTS
    assert found["authors' code"][0] == "loads as it is"
    policy = found["images that are not square"][0]
    expected = {"docowl2": "crops (grid_12)", "docowl1_5": "crops (grid_9)"}
    assert policy == expected.get(golden, "resize" if golden == "mplug_owl2_1" else "pad")


def test_adapters_of_the_authors_are_recognized_by_their_base(checkpoint):
    """Q-Align's LoRAs have no name that is known; their adapter_config.json names OneAlign."""
    folder = checkpoint("someone/csiq-LoRA")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": ""}))
    command, remark = cells(folder)["use with"]
    assert (command, "q-future/one-align" in remark) == ("owl2 rate", True)


@pytest.mark.parametrize("name", [name for name in IDS if name in CHECKPOINTS])
def test_scoring_models_do_not_chat(name, tmp_path, run_cli):
    if CHECKPOINTS[name].answers:
        check_answers(name)
        return
    with raises_input_error(ErrorCode.UNSUPPORTED, "owl2 rate", "q-instruct"):
        check_answers(name)
    result = run_cli("chat", "--model", name, "Hello?")
    assert (result.exit_code, "owl2 rate" in result.stderr) == (2, True)
    output = tmp_path / "captions.jsonl"
    result = run_cli("caption", tmp_path, "--model", name, "--output-file", output)
    assert (result.exit_code, "owl2 rate" in result.stderr) == (2, True)


@pytest.mark.parametrize("name", [name for name in IDS if name not in CHECKPOINTS])
def test_chat_and_document_models_do_not_rate(name, checkpoint, tmp_path, run_cli):
    folder = checkpoint(name)
    if name == "MAGAer13/mplug-owl2-llama2-7b":
        check_answers(name)
    result = run_cli(
        "rate", tmp_path, "--model", folder, "--output-file", tmp_path / "scores.jsonl"
    )
    assert (result.exit_code, "q-future/one-align" in result.stderr) == (2, True)


@pytest.mark.parametrize("name", ["docowl1_5", "docowl2"])
def test_image_policies_do_not_apply_to_crops(name):
    folder = FOLDER / name / "model"
    with raises_input_error(ErrorCode.CONFLICT, "pad", "anchors"):
        Owl2Processor.from_pretrained(folder, image_policy="pad")
    assert Owl2Processor.from_pretrained(folder, image_policy=None, anchors="grid_4")


def test_crops_do_not_apply_to_image_policies():
    with pytest.raises(TypeError, match="anchors"):
        Owl2Processor.from_pretrained(FOLDER / "one_align" / "model", anchors="grid_4")


def test_parts_of_another_model_type_are_refused_with_it(checkpoint):
    folder = checkpoint("mPLUG/DocOwl2")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mplug_owl2"}))
    with raises_input_error(ErrorCode.INVALID_CONFIG, "mplug_docowl"):
        size_table(str(folder))
