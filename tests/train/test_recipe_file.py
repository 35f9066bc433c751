"""Recipes from files and from the command line, and the errors a user gets."""

import pytest

from owl2.errors import InputError
from owl2.train.recipe_file import read_recipe

LEAST = """\
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


def test_a_recipe_over_its_base_and_words_over_both(write):
    write(LEAST + "learning_rate: 5e-5\nseed: 1\n", "bases/base.yaml")
    path = write("base: bases/base.yaml\nstage: 2\nseed: 2\n")
    recipe = read_recipe(path, ["batch_size=32", "data.0.count=7", "data.0.options.style=joined"])
    assert recipe.learning_rate == 5e-5  # the base's
    assert (recipe.stage, recipe.seed) == (2, 2)  # the recipe's
    assert recipe.weight_decay == 0.0  # the stage's
    assert recipe.batch_size == 32  # the command line's
    assert recipe.data[0].count == 7
    assert recipe.data[0].options == {"style": "joined"}


def test_numbers_as_people_write_them(write):
    recipe = read_recipe(write(LEAST + "learning_rate: 3e-4\nadam_epsilon: 1E-8\nepochs: 2\n"))
    assert recipe.learning_rate == 3e-4
    assert recipe.adam_epsilon == 1e-8
    assert recipe.epochs == 2.0


def test_epochs_and_steps_oust_each_other(write):
    write(LEAST + "max_steps: 2000\n", "base.yaml")
    path = write("base: base.yaml\nepochs: 3\n")
    assert read_recipe(path).max_steps is None
    recipe = read_recipe(path, ["max_steps=3000"])
    assert (recipe.max_steps, recipe.epochs) == (3000, None)
    with pytest.raises(InputError, match="either `epochs` or `max_steps`"):
        read_recipe(path, ["max_steps=3000", "epochs=1"])


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ("learnin_rate: 1", "`learnin_rate`", "nearest is `learning_rate`"),
        ("learning_rate: fast", "`learning_rate` is 'fast'", "must be a number"),
        ("batch_size: 1.5", "`batch_size` is 1.5", "must be a whole number"),
        ("batch_size: true", "`batch_size` is True", "must be a whole number"),
        ("batch_size: 0", "`batch_size` is 0", "greater than or equal to 1"),
        ("compile: 1", "`compile` is 1", "must be true or false"),
        (
            "gradient_checkpointing: 1",
            "`gradient_checkpointing` is 1",
            "true, false or 'selective'",
        ),
        ("gradient_checkpointing: some", "`gradient_checkpointing` is 'some'", "or 'selective'"),
        ("augment: turn", "`augment` is 'turn'", "'none', 'crop_flip', 'flip' or 'dihedral'"),
        ("image_size: big", "`image_size` is 'big'", "must be a whole number"),
        ("learning_rate: .nan", "`learning_rate` is nan", "must be a finite number"),
    ],
)
def test_a_wrong_setting_is_named_with_file_and_field(write, line, field, words):
    path = write(LEAST + line + "\n")
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert field in str(caught.value)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_file_named_is_the_one_with_the_mistake(write):
    base = write(LEAST + "seed: one\n", "base.yaml")
    path = write("base: base.yaml\nworkers: two\n")
    with pytest.raises(InputError) as caught:
        read_recipe(path, ["log_every=three"])
    first, second, third = sorted(
        str(caught.value).splitlines(), key=lambda line: "the comm" in line
    )
    assert {first, second} == {
        f"{base}: `seed` is 'one', but must be a whole number",
        f"{path}: `workers` is 'two', but must be a whole number",
    }
    assert third == "the command line: `log_every` is 'three', but must be a whole number"


def test_settings_at_odds_are_not_blamed_on_one_of_their_origins(write):
    write(LEAST + "min_learning_rate: 1e-3\n", "base.yaml")
    path = write("base: base.yaml\n")
    with pytest.raises(InputError) as caught:
        read_recipe(path)  # the stage's learning_rate is 1e-4
    assert str(caught.value).startswith(f"{path}: `min_learning_rate`")
    with pytest.raises(InputError) as caught:
        read_recipe(path, ["learning_rate=1e-5"])
    assert str(caught.value).startswith(f"{path} or the command line: `min_learning_rate`")


@pytest.mark.parametrize("stage", ["true", "1.0", "'1'"])
def test_a_stage_is_a_whole_number(write, stage):
    with pytest.raises(InputError, match=r"`stage` is .*, but must be 1 or 2"):
        read_recipe(write(LEAST.replace("stage: 1", f"stage: {stage}")))


def test_a_seed_has_32_bits(write):
    assert read_recipe(write(LEAST), [f"seed={2**32 - 1}"]).seed == 2**32 - 1
    with pytest.raises(InputError, match="`seed` is 4294967296, but must be"):
        read_recipe(write(LEAST), [f"seed={2**32}"])


def test_mistakes_within_a_source(write):
    path = write(LEAST)
    with pytest.raises(InputError, match=r"`data.0.cuont`; the nearest is `count`"):
        read_recipe(path, ["data.0.cuont=1"])
    with pytest.raises(InputError, match=r"`data.0.count` is 'x', but must be a whole number"):
        read_recipe(path, ["data.0.count=x"])
    with pytest.raises(InputError, match="`data` has 1 entries"):
        read_recipe(path, ["data.1.count=1"])
    with pytest.raises(InputError, match="nothing at `seeds` that could hold"):
        read_recipe(write(LEAST + "seeds: 3\n"), ["seeds.a=1"])
    with pytest.raises(InputError, match="`data` is empty"):
        read_recipe(path, ["data=[]"])


def test_a_wrong_stage_is_the_only_complaint(write):
    path = write(LEAST.replace("stage: 1", "stage: 3"))
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert str(caught.value) == f"{path}: `stage` is 3, but must be 1 or 2"


def test_what_must_be_given_is_asked_for(write):
    path = write(LEAST.replace("model: m\n", ""))
    with pytest.raises(InputError, match="`model` is missing: the checkpoint to start from"):
        read_recipe(path)


def test_files_that_are_no_recipe(write, tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*nowhere.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match=r"there is no file .*gone.yaml"):
        read_recipe(write("base: gone.yaml\n"))
    with pytest.raises(InputError, match=r"recipe.yaml:3:1: this is not YAML"):
        read_recipe(write("model: m\noutput: [o\n"))
    with pytest.raises(InputError, match=r"recipe.yaml:2:1: .*'model' stands twice"):
        read_recipe(write("model: m\nmodel: n\n"))
    with pytest.raises(InputError, match="`key: value` lines"):
        read_recipe(write("- a\n- b\n"))
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path)
    with pytest.raises(InputError, match="key=value"):
        read_recipe(write(LEAST), ["seed"])
    with pytest.raises(InputError, match="not YAML"):
        read_recipe(write(LEAST), ["seed=["])


def test_bases_in_a_circle(write):
    write("base: b.yaml\n", "a.yaml")
    path = write("base: a.yaml\n", "b.yaml")
    with pytest.raises(InputError, match=r"each other's `base`: .*b.yaml → .*a.yaml → .*b.yaml"):
        read_recipe(path)
