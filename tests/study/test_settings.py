"""The settings of a study."""

import pytest
import yaml
from study import read_study

from owl2.errors import ErrorCode
from tests.errors import raises_input_error

STUDY = {
    "name": "test",
    "output": "out",
    "results": "results.json",
    "start": {"llm": "fresh", "vision": "fresh"},
    "stages": [{"recipe": "stage.yaml"}],
    "arms": {"a": {}, "b": {"title": "B"}, "c": {"start": {"seed": 4}}},
    "baseline": "a",
    "seeds": 2,
    "evaluation": {"tasks": "easy_vqa"},
}


def write(path, **changes):
    content = {key: value for key, value in {**STUDY, **changes}.items() if value is not ...}
    path.write_text(yaml.safe_dump(content))
    return path


def test_runs_of_the_main_arms_come_first(tmp_path):
    study = read_study(write(tmp_path / "study.yaml", main=["c", "a"], main_seeds=3))
    main = [(arm, seed) for seed in range(3) for arm in ("c", "a")]
    assert list(study.cells()) == [*main, ("b", 0), ("b", 1)]


def test_an_arm_replaces_settings_of_the_start(tmp_path):
    study = read_study(write(tmp_path / "study.yaml"))
    assert [study.start_of(arm).seed for arm in "abc"] == [0, 0, 4]


def test_a_study_is_based_on_another(tmp_path):
    write(tmp_path / "base.yaml")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nseeds: 7\n")
    study = read_study(tmp_path / "own.yaml")
    assert (study.seeds, study.name) == (7, "test")


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"baseline": "d"}, "d"),
        ({"main": ["a", "e"]}, "e"),
        ({"evaluation": ...}, "measures"),
        ({"where": 3}, "where"),
        ({"sedes": 3}, "sedes"),
        ({"arms": {"a": {}}}, "arms"),
        ({"arms": {"a": {"model": {"mam": []}}, "b": {}}}, "arms.a.model.mam"),
        ({"stages": []}, "stages"),
    ],
)
def test_invalid_settings(changes, needle, tmp_path):
    path = write(tmp_path / "study.yaml", **changes)
    with raises_input_error(ErrorCode.INVALID_VALUE, str(path), needle):
        read_study(path)
