"""Recipes from files and from the command line, and their errors."""

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.train.recipe_file import read_recipe
from tests.errors import raises_input_error

MINIMAL = """\
model: m
output: o
stage: 1
data:
  - dataset: easy_vqa
    count: 10
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="recipe.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_recipe_overrides_its_base_and_arguments_override_both(write):
    write(MINIMAL + "learning_rate: 5e-5\nseed: 1\n", "bases/base.yaml")
    path = write("base: bases/base.yaml\nstage: 2\nseed: 2\n")
    recipe = read_recipe(path, ["batch_size=32", "data.0.count=7", "data.0.options.style=joined"])
    assert recipe.learning_rate == 5e-5  # from the base
    assert (recipe.stage, recipe.seed) == (2, 2)  # from the recipe
    assert recipe.weight_decay == 0.0  # from the defaults of stage 2
    assert recipe.batch_size == 32  # from the command line
    assert recipe.data[0].count == 7
    assert recipe.data[0].options == {"style": "joined"}


def test_numbers_in_scientific_notation(write):
    recipe = read_recipe(write(MINIMAL + "learning_rate: 3e-4\nadam_epsilon: 1E-8\nepochs: 2\n"))
    assert recipe.learning_rate == 3e-4
    assert recipe.adam_epsilon == 1e-8
    assert recipe.epochs == 2.0


def test_epochs_and_max_steps_replace_each_other(write):
    write(MINIMAL + "max_steps: 2000\n", "base.yaml")
    path = write("base: base.yaml\nepochs: 3\n")
    assert read_recipe(path).max_steps is None
    recipe = read_recipe(path, ["max_steps=3000"])
    assert (recipe.max_steps, recipe.epochs) == (3000, None)
    with raises_input_error(ErrorCode.CONFLICT, "`epochs`", "`max_steps`"):
        read_recipe(path, ["max_steps=3000", "epochs=1"])


@pytest.mark.parametrize(
    ("line", "code", "needles"),
    [
        ("learnin_rate: 1", ErrorCode.UNKNOWN_NAME, ("`learnin_rate`", "`learning_rate`")),
        ("log_every: 1", ErrorCode.UNKNOWN_NAME, ("`log_every`",)),
        ("learning_rate: fast", ErrorCode.INVALID_TYPE, ("`learning_rate` is 'fast'", "number")),
        ("batch_size: 1.5", ErrorCode.INVALID_TYPE, ("`batch_size` is 1.5", "integer")),
        ("batch_size: true", ErrorCode.INVALID_TYPE, ("`batch_size` is True", "integer")),
        ("batch_size: 0", ErrorCode.INVALID_VALUE, ("`batch_size` is 0", "equal to 1")),
        ("compile: 1", ErrorCode.INVALID_TYPE, ("`compile` is 1", "true or false")),
        (
            "gradient_checkpointing: 1",
            ErrorCode.INVALID_VALUE,
            ("`gradient_checkpointing` is 1", "true, false or 'selective'"),
        ),
        (
            "gradient_checkpointing: some",
            ErrorCode.INVALID_VALUE,
            ("`gradient_checkpointing` is 'some'", "'selective'"),
        ),
        ("augment: turn", ErrorCode.INVALID_VALUE, ("`augment` is 'turn'", "'crop_flip', 'flip'")),
        ("image_size: big", ErrorCode.INVALID_TYPE, ("`image_size` is 'big'", "integer")),
        ("learning_rate: .nan", ErrorCode.INVALID_VALUE, ("`learning_rate` is nan", "finite")),
        ("lora: {ranks: 4}", ErrorCode.UNKNOWN_NAME, ("`lora.ranks`",)),
        ("lora: {alpha: 4}", ErrorCode.UNKNOWN_NAME, ("`lora.alpha`", "`lora_alpha`")),
        ("seed: 4294967296", ErrorCode.INVALID_VALUE, ("`seed` is 4294967296",)),
    ],
)
def test_error_names_the_file_the_field_and_the_value(write, line, code, needles):
    path = write(MINIMAL + line + "\n")
    with raises_input_error(code, path, *needles):
        read_recipe(path)


def test_error_names_the_file_that_contains_the_value(write):
    base = write(MINIMAL + "seed: one\n", "base.yaml")
    path = write("base: base.yaml\ndataloader_num_workers: two\n")
    with raises_input_error(
        ErrorCode.INVALID_TYPE,
        f"{base}: `seed` is 'one'",
        f"{path}: `dataloader_num_workers` is 'two'",
        "the command line: `logging_steps` is 'three'",
    ):
        read_recipe(path, ["logging_steps=three"])


def test_conflict_names_the_recipe_and_not_the_origin_of_one_setting(write):
    write(MINIMAL + "min_lr: 1e-3\n", "base.yaml")
    path = write("base: base.yaml\n")
    with raises_input_error(ErrorCode.CONFLICT, f"{path}: `min_lr`"):
        read_recipe(path)  # the default learning_rate of the stage is 1e-4
    with raises_input_error(ErrorCode.CONFLICT, f"{path} or the command line: `min_lr`"):
        read_recipe(path, ["learning_rate=1e-5"])


@pytest.mark.parametrize(
    ("stage", "code", "needle"),
    [
        ("true", ErrorCode.INVALID_TYPE, "an integer"),
        ("1.0", ErrorCode.INVALID_TYPE, "an integer"),
        ("'1'", ErrorCode.INVALID_TYPE, "an integer"),
        ("3", ErrorCode.INVALID_VALUE, "equal to 2"),
    ],
)
def test_invalid_stage_is_the_only_error(write, stage, code, needle):
    with raises_input_error(code, "`stage` is ", needle) as error:
        read_recipe(write(MINIMAL.replace("stage: 1", f"stage: {stage}")))
    assert len(str(error.value).splitlines()) == 1


def test_seed_of_32_bits_is_accepted(write):
    assert read_recipe(write(MINIMAL), [f"seed={2**32 - 1}"]).seed == 2**32 - 1


@pytest.mark.parametrize(
    ("argument", "code", "needles"),
    [
        ("data.0.cuont=1", ErrorCode.UNKNOWN_NAME, ("`data.0.cuont`", "`count`")),
        ("data.0.count=x", ErrorCode.INVALID_TYPE, ("`data.0.count` is 'x'",)),
        ("data.1.count=1", ErrorCode.UNKNOWN_NAME, ("'data.1.count'", "easy_vqa")),
        ("seeds.a=1", ErrorCode.UNKNOWN_NAME, ("'seeds.a'", "3")),
        ("data=[]", ErrorCode.INVALID_VALUE, ("`data`",)),
        ("seed", ErrorCode.INVALID_FORMAT, ("option=value",)),
        ("seed=[", ErrorCode.INVALID_FORMAT, ("seed=[",)),
    ],
)
def test_invalid_override_is_refused(write, argument, code, needles):
    path = write(MINIMAL + "seeds: 3\n" if argument.startswith("seeds") else MINIMAL)
    with raises_input_error(code, *needles):
        read_recipe(path, [argument])


def test_missing_key_is_described(write):
    path = write(MINIMAL.replace("model: m\n", ""))
    with raises_input_error(ErrorCode.MISSING_VALUE, "`model`", "checkpoint"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("text", "code", "needle"),
    [
        ("base: missing.yaml\n", ErrorCode.FILE_NOT_FOUND, "missing.yaml"),
        ("model: m\noutput: [o\n", ErrorCode.INVALID_FORMAT, "recipe.yaml:3:1"),
        ("model: m\nmodel: n\n", ErrorCode.INVALID_FORMAT, "recipe.yaml:2:1"),
        ("- a\n- b\n", ErrorCode.INVALID_FORMAT, "recipe.yaml"),
        ("base: 3\n", ErrorCode.INVALID_TYPE, "`base`"),
    ],
)
def test_invalid_file_is_refused(write, text, code, needle):
    with raises_input_error(code, needle):
        read_recipe(write(text))


def test_unreadable_file_is_refused(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "nowhere.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, tmp_path):
        read_recipe(tmp_path)


def test_cycle_of_bases_is_refused(write):
    write("base: b.yaml\n", "a.yaml")
    path = write("base: a.yaml\n", "b.yaml")
    with pytest.raises(InputError) as error:
        read_recipe(path)
    assert error.value.code is ErrorCode.CONFLICT
    assert [str(error.value).count(name) for name in ("a.yaml", "b.yaml")] == [1, 2]
