"""The letter of the option that a response means."""

import pytest

from owl2.eval.metrics.choices import (
    LETTER,
    parse_letter,
    parse_letter_mmbench,
    with_options,
)
from tests.eval.reading import response

OPTIONS = ("a dog", "a dog house", "two cats", "none of them")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(c)", "C"),
        ("D.", "D"),
        ("**B**", "B"),
        ("The answer is **B**.", "B"),
        ("B. a dog house", "B"),
        ("B: two cats", "B"),  # the letter precedes the text
        ("(B) a dog house", "B"),
        ("C) two cats", "C"),
        ("c) two cats", "C"),
        ("B\nBecause it has a roof.", "B"),
        ("B a dog house", "B"),
        ("A, a dog", "A"),
        ("The answer is B.", "B"),
        ("The answer is A", "A"),
        ("Answer: (C)", "C"),
        ("The correct answer is: D because there is nothing", "D"),
        ("I would choose option C here.", "C"),
        ("Neither A nor B fits; the answer is C.", "C"),
        ("It must be (D), I think", "D"),
        ("B is correct.", "B"),
        ("A is the right one", "A"),
        ("C because there are two", "C"),
        ("I choose D.", "D"),
        ("I would say A", "A"),
        ("It's B", "B"),
        ("a dog", "A"),
        ("A dog", "A"),
        ("A dog house.", "B"),
        ("There are two cats in the image", "C"),
        ("The answer is: A dog house", "B"),
        # No option, or several:
        ("", None),
        ("E", None),
        ("The answer is E.", None),
        ("I think so", None),
        ("It is rich in vitamin C", None),
        ("D flat", None),
        ("It is a C major chord", None),
        ("A bird", None),
        ("The answer is B or C", None),
        ("(A) or (B)", None),
        ("Option A and option B", None),
        ("two cats and a dog", None),
        ("dogs", None),
        ("a doghouse", None),
        ("The answer", None),
    ],
)
def test_letter_of_a_response(text, letter):
    assert parse_letter(text, OPTIONS) == letter


ANIMALS = ("a red dog", "a cat", "two birds", "the house")
COLORS = ("red", "green", "blue", "yellow")
CHINESE = ("红色", "绿色", "蓝色", "深蓝色")
LIST = "A. red\nB. green\nC. blue\nD. yellow"


@pytest.mark.parametrize(
    ("text", "letter", "options"),
    [
        ("A is wrong, B is right.", "B", ANIMALS),
        ("A is incorrect.", None, ANIMALS),
        ("A.B.", None, ANIMALS),
        ("Therefore, C is correct.", "C", ANIMALS),
        ("The correct option is B because cats meow", "B", ANIMALS),
        ("I'd go with B.", "B", ANIMALS),
        ("Definitely B.", "B", ANIMALS),
        ("Answer A", "A", ANIMALS),
        ("Selected: B", "B", ANIMALS),
        ("Yes, B", "B", ANIMALS),
        ("B is wrong.", None, ANIMALS),
        (LIST + "\nAnswer: D", "D", COLORS),
        ("A: red, B: green, C: blue, D: yellow. The answer is C.", "C", COLORS),
        (LIST, None, COLORS),
        ("B. green\nC. blue", None, COLORS),
        ("B", "B", COLORS),
        ("B. green", "B", COLORS),
        ("The answer is B. Note that A is a distractor.", "B", COLORS),
        ("B\n\nExplanation: A is red", "B", COLORS),
        ("A. red", "A", COLORS),
        ("A. red B. green C. blue D. yellow Answer: D", "D", COLORS),
        (LIST + "\n\nB", "B", COLORS),
        (LIST + "\nB. green", "B", COLORS),
        ("(A) red (B) green (C) blue (D) yellow", None, COLORS),
        ("(A) red (B) green (C) blue (D) yellow\nThe correct choice is (C).", "C", COLORS),
        ("Options: A. red, B. green, C. blue, and D. yellow. I choose B", "B", COLORS),
        ("Answer: A. red\nB. green\nC. blue\nD. yellow", None, COLORS),
        ("A) red\nB) green\nC) blue\nD) yellow\n\nThe sky is blue", "C", COLORS),
        ("C. blue\nB. green", None, COLORS),
        ("A. It shows red\nB. It shows green\nAnswer: B", "B", COLORS),
        ("A: red\nB: green\nC: blue\nD: yellow\n答案：C", "C", COLORS),
        ("The answer is B. green, not A. red", "B", COLORS),
        ("Not A, but B", "B", COLORS),
        ("It isn't A. It's B.", "B", COLORS),
        ("Neither A nor B.", None, COLORS),
        ("A and C are incorrect, so B", "B", COLORS),
        ("A, C and D are wrong. B is correct.", "B", COLORS),
        ("It is not green", None, COLORS),
        ("It is not green but blue.", "C", COLORS),
        ("I would eliminate A and C. The answer is D.", "D", COLORS),
        ("B, not A", "B", COLORS),
        ("The answer is not A", None, COLORS),
        ("The answer is B, because A is wrong", "B", COLORS),
        ("A isn't correct", None, COLORS),
        ("A cannot be right.", None, COLORS),
        ("B isn't right; C is.", "C", COLORS),
        ("\\boxed{B}", "B", COLORS),
        ("$\\boxed{\\text{C}}$", "C", COLORS),
        ("`B`", "B", COLORS),
        ("[B]", "B", COLORS),
        ("'B'", "B", COLORS),
        ('"B"', "B", COLORS),
        ('The answer is "B".', "B", COLORS),
        ("The answer is 'B'", "B", COLORS),
        ("<answer>B</answer>", "B", COLORS),
        ("answer: b", "B", COLORS),
        ("The answer is (b).", "B", COLORS),
        ("B, because grass is green", "B", COLORS),
        ("B; green", "B", COLORS),
        ("B - green", "B", COLORS),
        ("B) green", "B", COLORS),
        ("Option B", "B", COLORS),
        ("Option B: green", "B", COLORS),
        ("Choice C.", "C", COLORS),
        ("I pick D", "D", COLORS),
        ("I'd say B", "B", COLORS),
        ("I would go for C", "C", COLORS),
        ("I think it's B.", "B", COLORS),
        ("My answer: C", "C", COLORS),
        ("Final answer: D", "D", COLORS),
        ("The best answer is A.", "A", COLORS),
        ("The right choice is C", "C", COLORS),
        ("A or B", None, COLORS),
        ("A/B", None, COLORS),
        ("A and B", None, COLORS),
        ("Both A and B are correct", None, COLORS),
        ("ABCD", None, COLORS),
        ("E", None, COLORS),
        ("I don't know", None, COLORS),
        ("I", None, COLORS),
        ("None", None, COLORS),
        ("Answer", None, COLORS),
        ("Sure, the answer is C", "C", COLORS),
        ("So the answer would be D.", "D", COLORS),
        ("The correct answer should be A", "A", COLORS),
        ("The answer must be option D", "D", COLORS),
        ("The answer is clearly B", "B", COLORS),
        ("The answer is: **C**", "C", COLORS),
        ("**Answer:** D", "D", COLORS),
        ("### B", "B", COLORS),
        ("Ｂ", "B", COLORS),
        ("（Ｂ）", "B", COLORS),
        ("Ｂ．", "B", COLORS),
        ("green", "B", COLORS),
        ("Green.", "B", COLORS),
        ("The color is green.", "B", COLORS),
        ("It looks red or green", None, COLORS),
        ("选B", "B", COLORS),
        ("答案是B", "B", COLORS),
        ("答案：B", "B", COLORS),
        ("B、绿色", "B", COLORS),
        ("选择B", "B", COLORS),
        ("选项B", "B", COLORS),
        ("我选B。", "B", COLORS),
        ("应该选B", "B", COLORS),
        ("答案为C", "C", COLORS),
        ("正确答案是D", "D", COLORS),
        ("正确选项是：C", "C", COLORS),
        ("B是正确的", "B", COLORS),
        ("B正确", "B", COLORS),
        ("A不正确", None, COLORS),
        ("A错误，B正确", "B", COLORS),
        ("不是A，是B", "B", COLORS),
        ("排除A和C，选B", "B", COLORS),
        ("因此答案是（B）。", "B", COLORS),
        ("答案：Ｂ", "B", COLORS),
        ("选Ｂ", "B", COLORS),
        ("B。", "B", COLORS),
        ("B，绿色", "B", COLORS),
        ("选B因为草是绿的", "B", COLORS),
        ("B选项", "B", COLORS),
        ("答案是A或B", None, COLORS),
        ("应选D", "D", COLORS),
        ("故选C", "C", COLORS),
        ("故选：C", "C", COLORS),
        ("本题选A", "A", COLORS),
        ("A选项不正确，B选项正确", "B", COLORS),
        ("B项正确", "B", COLORS),
        ("不选A", None, COLORS),
        ("答案不是A", None, COLORS),
        ("图中是绿色的", "B", CHINESE),
        ("深蓝色", "D", CHINESE),
        ("图里的车是深蓝色的。", "D", CHINESE),
        ("不是红色", None, CHINESE),
        ("不是红色，是绿色", "B", CHINESE),
        ("A. 红色\nB. 绿色\nC. 蓝色\nD. 深蓝色\n答案：B", "B", CHINESE),
        ("A、红色 B、绿色 C、蓝色 D、深蓝色", None, CHINESE),
        ("B、绿色", "B", CHINESE),
        ("B绿色", "B", CHINESE),
        ("红色和绿色", None, CHINESE),
        ("A. 红色  B. 绿色  C. 蓝色  D. 深蓝色 选C", "C", CHINESE),
    ],
)
def test_letter_of_negations_lists_and_chinese(text, letter, options):
    """Letters that the response calls wrong, repeated lists, and Chinese do not mislead."""
    assert parse_letter(text, options) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A is incorrect.", "A"),  # a short response with one letter
        ("It is rich in vitamin C", "C"),
        ("A and B", None),
        ("The answer is A, not B", "A"),
        ("A rather long text about the answer, not a letter", None),
        ("a cat", "B"),
        ("Z", None),  # the letter for no option
        ("选B", "B"),  # left to the other parser
    ],
)
def test_mmbench_has_the_rule_of_vlmevalkit(text, letter):
    assert parse_letter_mmbench(text, ANIMALS) == letter


def test_words_that_start_with_a_letter_and_a_hyphen():
    assert parse_letter("The answer is X-ray", ("MRI", "X-ray")) == "B"
    assert parse_letter("The answer is B-side", ("A-side", "B-side")) == "B"


def test_fewer_options_have_fewer_letters():
    assert parse_letter("C", OPTIONS) == "C"
    assert parse_letter("C", OPTIONS[:2]) is None


def test_equal_and_empty_options_are_ambiguous():
    assert parse_letter("yes", ("yes", "yes", "no")) is None
    assert parse_letter("no", ("yes", "yes", "no")) == "C"
    assert parse_letter("maybe", ("", "no")) is None


def test_options_may_contain_numbers_and_signs():
    assert parse_letter("12", ("1", "12", "2")) == "B"
    assert parse_letter("It is 3.5", ("3", "3.5")) == "B"
    assert parse_letter("-2", ("2", "-2")) == "B"
    assert parse_letter("x + 1", ("x", "x + 1")) == "B"


def test_options_follow_the_question():
    assert with_options("Which?", ["red", "blue"]) == "Which?\nA. red\nB. blue"


def test_unparsed_responses_are_wrong():
    pairs = [("B", "B"), ("C.", "B"), ("hm", "A"), ("D", "D")]
    scores = LETTER.score([response(text, letter, options=OPTIONS) for text, letter in pairs])
    assert scores.per_sample == [1.0, 0.0, 0.0, 1.0]
    assert scores.metrics == {"accuracy": 0.5, "unparsed": 0.25}
