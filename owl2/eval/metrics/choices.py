"""Multiple-choice questions: the letter that a response means.

Models respond "B", "(B)", "B. a dog", "The answer is B." or "a dog". A response that names no
option or several counts as unparsed and wrong; nothing is guessed. (lmms-eval uses the first
character for SEED-Bench, any capital letter as a last resort elsewhere, and a random option for
Q-Bench.) MMBench has the rule of its official scorer first, MMMU (`mmmu.py`) only that one.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence

from owl2.data.datasets.prompts import LETTERS
from owl2.eval.metrics import Metric, Scores, mean, mean_metric
from owl2.eval.samples import Response

Parser = Callable[[str, Sequence[str]], str | None]

_W = "0-9A-Za-z_À-ɏ"  # of a word; Chinese has no boundaries between words
_FITS = (
    r"(?:best\s+)?(?:answers|corresponds to|describes|fits|matches|represents|"
    r"makes\s+(?:(?:the|most|more|perfect)\s+)*sense)"
)
# A letter that is not part of a word. "A" and "I" are also words: as letters they end the response,
# or punctuation, a reason or Chinese text follows.
_LETTER = (
    rf"(?<![-{_W}])[\"'“‘(\[{{<`]*(?:([B-HJ-Z])(?![-+#]|['’]?[{_W}])|([AI])(?![-+#]|['’]?[{_W}])"
    rf"(?=\s*(?:$|\n|[^-\s{_W}]|(?:and|are|as|because|but|can|cannot|could|does(?:n't)?|for|has|"
    rf"is(?:n't)?|looks|must|n?or|seems|should|since|was(?:n't)?|would|{_FITS})\b)))[\"'”’)\]}}>`]*"
)
_OR = r"(?:[/&、和或与]|\bn?or\b|\band\b)"
_ONE_OR_TWO = rf"{_LETTER}(?:\s*{_OR}\s*{_LETTER})?"
_MORE = rf"(?:\s*,?\s*{_OR}\s*(?:option\s+)?{_LETTER})"
_LIST = rf"{_LETTER}(?:\s*[,、]\s*{_LETTER})*{_MORE}*"
# After "not" a letter behind a comma is the answer, unless the list ends with "or".
_NOT_LIST = rf"{_LETTER}(?:(?:\s*,\s*{_LETTER})*{_MORE}+)?"
# Letters that are wrong according to the response. They are removed first.
_NEGATED = tuple(
    re.compile(rule)
    for rule in (
        r"(?i:\b(?:neither|none of(?:\s+the)?(?:\s+\w+s)?|anything but|except|exclud\w+|"
        rf"eliminat\w+|reject\w*|rul\w+ out))\s+{_LIST}",
        r"(?i:\b(?:wrong|incorrect|false)\s+(?:\w+\s+)?(?:is|are|was|were)\b|\b(?:wrong|incorrect)"
        rf"(?:\s+\w+)?:)\s*(?i:options?\s+)?{_LIST}",
        r"(?:错误?|不正确|不对|有误|不符合?(?:题意)?|不可能)的?(?:选项|答案|一项|说法)?[是为有:]+\s*(?:选项)?"
        rf"{_LIST}",
        r"(?i:(?:\b(?:and|but)\s+)?(?:\b(?:no|not|never|instead of|rather than|cannot)|n['’]t))\s+"
        r"(?i:(?:answer|be|believe|both|choice|choose|either|is|it|it['’]s|option|pick|"
        rf"select|that|the|think|(?-i:an?))\s+)*{_NOT_LIST}",
        rf"(?:{_LETTER}(?:\s+option)?\s+(?i:is|was|does|seems|looks)|{_LIST}\s+(?i:are|were|can|"
        r"could|do|did|would|should))(?:n['’]t\b|not\b|(?:\s+(?i:all|also|an?|be|both|the|\w+ly))*\s+"
        r"(?i:not|never|wrong|false|incorrect|invalid|inaccurate|impossible|untrue|unlikely|"
        r"irrelevant|(?:ruled\s+)?out|eliminated|excluded)\b)",
        r"(?:不(?:应该?|能|会|可以?|可能|要)?(?:选择?|是)|没有|并非|排除了?|而非|而不是)\s*(?:选项|答案)?\s*"
        rf"{_LIST}",
        rf"(?<![是选为:]){_LIST}\s*(?:选项|项|答案)?(?:都|均|也|是|为|被|可以?|明显|显然|肯定)*"
        r"(?:不(?:正确|可能|对|是|符合)?|错误?|有误|排除)",
    )
)
_BE = r"(?:[:=>→-]|(?i:\s*(?:is|was|be|(?:will|would|should|must|might|may|could|can only) be))\b)"
_STRONG_RULES = tuple(
    re.compile(rule)
    for rule in (
        r"\\boxed\{\{?\(?([A-Z])\b",
        r"\b(?i:(?:so|therefore|thus|hence),? the (?:\w+ )?(?:answer|option|choice) is)\s+"
        rf"{_LETTER}",
        rf"\b(?i:answer|ans\.?|selected|selection|correct (?:option|choice|letter|one))[\"']?\s*"
        rf"{_BE}*\s*(?i:(?:the|option|choice|letter|indeed|\w+ly)\s+)*{_ONE_OR_TWO}",
        r"(?:答案|正确的?选项|应该?选|我选)(?:应该|应当|应|只能|可能|大概|就)?[是为选:=\s]*(?:选项)?\s*"
        rf"{_ONE_OR_TWO}",
        rf"{_LETTER}[.:]?\s*(?i:is|['’]s|(?:must|would|should|might|may|could|has to) be|seems|"
        r"looks|appears)(?:\s+(?i:to be|\w+ly|the|more|most|only|best|also))*\s+"
        r"(?i:correct|right|true|answer|better|best|accurate|appropriate|likely|suitable)\b",
        rf"{_LETTER}\s*(?i:best\s+\w+s|\w+s best|remains)\b",
        rf"{_LETTER}\s*(?:选项|项)?(?:才?是|为|更|最|较为?|比较)*(?:正确|准确|合理|恰当|对(?=[的\W]|$)|最佳|答案|符合|合适)",
        rf"\b(?i:hence|so|therefore|thus)(?:,?\s*|\s+it(?:['’]s| is)\s+){_LETTER}\W*$",
    )
)
_WEAK_RULES = tuple(
    re.compile(rule)
    for rule in (
        r"(?i:\b(?:answer\s*(?:is|:)|option|choice))\s*[(\[]?([a-z])(?=[)\]]?\s*(?:$|[.,;!\n]))",
        rf"\b(?i:option|choice|letter)\s+{_ONE_OR_TWO}",
        rf"\b(?i:choose|chose|pick|select|vote|go(?:ing)? (?:with|for)|opt for|settle on|"
        r"lean(?:ing)? towards?|leaves|leaving)\s+(?i:(?:only|the|for|option|choice|answer|letter)"
        rf"\s+)*{_ONE_OR_TWO}",
        rf"选(?:择|项)?[:是为\s]*{_ONE_OR_TWO}",
        rf"{_LETTER}\s*选?项",
        rf"(?:[是为猜故答]|所以|因此|认为|觉得)\s*{_LETTER}\W*$",
        rf"(?:^|[.;,\n]\s*|\b(?i:only|so|thus)\s+){_LETTER}\s+{_FITS}\b",
        rf"(?:^|[.;\n]\s*){_LETTER}\s*[-:]?\s+(?:as|because|is|since|for sure|it is|obviously)\b",
        r"(?i:\b(?:be|believe|but|certainly|choose|clearly|conclusion|course|definitely|doubt|"
        r"elimination|guess|hmm|indicat(?:es|ing)|is|(?:it|that)['’]s|like|likely|maybe|no|now|"
        r"obviously|ok|okay|perhaps|pick|probably|say|suggest(?:s|ing)|sure|surely|then|think|to|well|"
        rf"yes))\s*[,:]?\s*{_LETTER}\s*(?=\W*$|[;,.]?\s*(?:as|because|since)\b)",
        r"[(\[]([A-Z])[)\]]",
        rf"(?:^|[.:!?;>→\n])\s*{_LETTER}(?=\W*$|\s*[.;\n])",  # a sentence
    )
)
# No second letter.
_NEXT = rf"(?!\s*(?:{_OR}|,)?\s*[(\[]?[A-Z](?:\W*$|[.,:;)\]/\n、都均也]|\s+{_OR}))"
_LEADING = re.compile(
    rf"\W*(?:([A-Za-z])(?:[^\w+#-]*$|\s*\([^()]+\)\W*$|[)\]]?\s*[.:)\]、。\n]{_NEXT})|([A-Z]),{_NEXT})"
)
_MARKUP = re.compile(  # Markdown, LaTeX, brackets around "答案" and letters
    r"</s>|<\|\w+\|>|\*|__|(?<=[A-Z])[吧呢啊呀哦嘛]+|\\[()\[\]]|\$(?=[A-Z\\])|(?<=[A-Z}])\$|\\(?:text|mathrm|mathbf|textbf)(?=\{)|"
    r"[【「『](?=(?:答案|[A-Z])[】」』])|(?<=[案A-Z])[】」』]|\[(?=答案\])|(?<=案)\]"
)
_LOWER = re.compile(rf"(?<![-'’{_W}])(?:[b-hj-z]|a(?=\W*$|[).:\]]))(?![-'’{_W}])")
_THOUGHTS = re.compile(r".*</think>", re.DOTALL)
_ABBREVIATION = re.compile(  # "Dr. B. Smith", "D.C."
    r"\b(?:Capt|Col|Dr|Gen|Lt|Mrs?|Ms|Prof|Sen|Sgt|Sir|St)\.?\s+(?:[A-Z]\.\s*)+|"
    rf"(?<![{_W}])(?:[A-Z]\.){{2,}}"
)
_VERDICT = re.compile(  # "A. False", "C ✓"
    rf"(?<![-{_W}])[(\[]?([A-Z])[)\]]?\s*[-.:、]?\s*(?:((?i:correct|right|true)|[✓✔✅对]|正确)|"
    r"(?i:incorrect|wrong|false)|[✗✘❌错])(?![a-z]|\s*[\d(\\])"
)
_REPEATED = re.compile(r"\W*([A-Za-z])(?:\W+(?:or\s+|and\s+)?\1)+\W*")
_OPTION = re.compile(r"\(([A-Z])\)")
_SIMPLIFIED = str.maketrans("選擇項應該對錯誤為確無×√", "选择项应该对错误为确无✗✓")


def parse_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a response in English or Chinese means; None if ambiguous.

    Thoughts (`<think>`), initials ("Dr. B. Smith"), a list of options that the response repeats,
    and letters that it calls wrong ("A is incorrect", "not A", "错误的是A") are removed. A list
    with one right option ("A ✗ B ✓") means that one. Then the first rule that finds a letter
    decides:

    1. The response is the text of one option.
    2. It contains "the answer is B", "B is correct", "答案是B", and no other letter in this form.
    3. It starts with a letter, followed by its end, ":", ".", ")", "、", a comma, a new line or the
       text of that option.
    4. It contains "option B", "I choose B", "选B", "B because ...", "(B)" or the sentence "B.", or
       ends with "so B", and no other letter in the same form.
    5. It contains "the answer is" with the text of one option, or that text and no other.

    Args:
        options: Their texts, in order; the letter of the first is A.
    """
    letters = LETTERS[: len(options)]
    text, *options = (
        unicodedata.normalize("NFKC", one).translate(_SIMPLIFIED) for one in (text, *options)
    )
    normalized = [_normalize(option) for option in options]
    if len(text.strip()) > 1 and normalized.count(_normalize(text)) == 1:
        return letters[normalized.index(_normalize(text))]
    text = _MARKUP.sub("", _THOUGHTS.sub("", text)).strip()
    verdicts = {found[1]: bool(found[2]) for found in _VERDICT.finditer(text)}
    is_list = len(verdicts) > 1 and sum(verdicts.values()) == 1 and verdicts.keys() <= set(letters)
    if is_list and not any(_VERDICT.search(f"A {option}") for option in options):
        return max(verdicts, key=lambda letter: verdicts[letter])
    text = _without_lists(_ABBREVIATION.sub("~ ", text), options)
    text = _REPEATED.sub(r"\1", text) if _REPEATED.fullmatch(text) else text
    if text.startswith("A:"):  # "answer"
        letter = parse_letter(text[2:], options)
        if letter is not None:
            return letter
    if text.islower():
        text = _LOWER.sub(lambda found: found[0].upper(), text)
    for rules in ((*_STRONG_RULES, _LEADING, *_WEAK_RULES), (*_STRONG_RULES, _OPTION)):
        for rule in _NEGATED:
            text = rule.sub("~", text)
        text = text.strip()
        for rule in rules:
            if rule is _LEADING:
                named = {_leading_letter(text, options)}
            else:
                groups = (found.groups() for found in rule.finditer(text))
                named = {letter.upper() for found in groups for letter in found if letter}
            if named & set(letters):
                return named.pop() if len(named) == 1 else None
        text = _options_to_letters(text, normalized)
    return None


def _leading_letter(text: str, options: Sequence[str]) -> str | None:
    by_letter = dict(zip(LETTERS, options, strict=False))
    found = re.match(r"\W*([A-Z])[\s.:)\]、,-]*(.+)", text, re.DOTALL)
    if found is None or _normalize(found[2]) != _normalize(by_letter.get(found[1], "")):
        found = _LEADING.match(text)
    letter = (found[1] or found[2]).upper() if found else None
    return letter if letter in by_letter else None


def _without_lists(text: str, options: Sequence[str]) -> str:
    """The text without two or more options in a row, each with its letter ("A. red, B. green").

    In a list of lines the texts may differ from those of the options. A list ends where a letter
    occurs again.
    """
    named = [
        rf"{letter}(?:[)\].:、,=\s-]+|\s*(?:is|是)\s*)"
        + r"\s+".join(map(re.escape, option.split()))
        for letter, option in zip(LETTERS, options, strict=False)
        if option.strip()
    ]
    item = rf"(?<![-{_W}])[(\[]?(?i:(?=\w)(?:{'|'.join(named)}))(?:(?<![{_W}])|(?![{_W}]))"
    line = rf"(?m:^)\W*?[{LETTERS[: len(options)]}][).:、][^\n]+(?=\n|$)"
    for one, gap in ((item, r"[\s,;.、。/|-]*(?:and|or|和|或)?\s*"), (line, r"\s*")):

        def repeated(run: re.Match[str], one: str = one) -> str:
            seen: set[str] = set()
            for found in re.finditer(one, run[0]):
                letter = next(filter(str.isalpha, found[0])).upper()
                if letter in seen:
                    return "\n" + run[0][found.start() :]
                seen.add(letter)
            return "\n"

        text = re.sub(rf"{one}(?:{gap}{one})+", repeated, text)
    return text.strip()


def _options_to_letters(text: str, options: Sequence[str]) -> str:
    """The text with "(A)" for the first option, ...; "dog house" does not contain "dog"."""
    text = _OPTION.sub(r"\1", " ".join(text.split()))
    for option in sorted(set(options), key=len, reverse=True):
        if option and options.count(option) == 1:
            pattern = rf"(?i)(?<![{_W}])(?<!\d\.){re.escape(option)}(?![{_W}]|\.\d)"
            text = re.sub(pattern, f"({LETTERS[options.index(option)]})", text)
    return text


def _normalize(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


_REFUSALS = (  # of VLMEvalKit
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def parse_letter_mmbench(text: str, options: Sequence[str]) -> str | None:
    """The letter by the rule of VLMEvalKit, the official scorer of MMBench; else `parse_letter`.

    The rule: None for a refusal; the only letter of an option among the words of the response, if
    it is one of the last four words or follows "answer is"; or else the only option whose text a
    short response contains. VLMEvalKit passes other responses to a language model, here to
    `parse_letter`.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return None
    letters = LETTERS[: len(options)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:  # the letter for no option
        return None
    found = re.search(r"(?i)answer\s+is\s+\**([ABCD])\**", text)
    if found and found[1].upper() in letters:
        return found[1].upper()
    lower, texts = text.lower(), [option.lower() for option in options]
    contained = [letter for letter, option in zip(letters, texts, strict=True) if option in lower]
    if len(contained) == 1 and len(text) <= 2 * sum(map(len, texts)):
        return contained[0]
    return parse_letter(text, options)


# ------------------------------------------------------------------ metrics


def _letters(responses: Sequence[Response], parse: Parser = parse_letter) -> Scores:
    """The expected answer of a sample is a letter; `options` of its metadata are the options."""
    letters = [parse(response.text, response.sample.metadata["options"]) for response in responses]
    correct = [
        float(letter == response.sample.expected[0])
        for letter, response in zip(letters, responses, strict=True)
    ]
    unparsed = mean([float(letter is None) for letter in letters])
    return Scores({"accuracy": mean(correct), "unparsed": unparsed}, [*correct])


def _circular(responses: Sequence[Response]) -> Scores:
    """The circular evaluation of MMBench: a question counts if all its rounds are correct.

    The options are rotated by one position in each round, so that a preference for a letter gains
    nothing (arXiv:2307.06281). Responses that `parse_letter_mmbench` does not parse count as wrong,
    and `unparsed` is their share. `question` of the metadata is the same for all rounds of a
    question.
    """
    scores = _letters(responses, parse_letter_mmbench)
    rounds: dict[str, list[float]] = defaultdict(list)
    for response, score in zip(responses, scores.per_sample, strict=True):
        rounds[response.sample.metadata["question"]].append(score or 0.0)
    metrics = {
        "accuracy": mean([min(values) for values in rounds.values()]),
        "accuracy_of_rounds": scores.metrics["accuracy"],
        "unparsed": scores.metrics["unparsed"],
    }
    return Scores(metrics, scores.per_sample)


def _seed_bench(responses: Sequence[Response]) -> Scores:
    """Accuracy for all samples, and by `media` of the metadata: "image" or "video"."""
    scores = _letters(responses)
    metrics = dict(scores.metrics)
    for media in ("image", "video"):
        selected = [
            score
            for response, score in zip(responses, scores.per_sample, strict=True)
            if response.sample.metadata["media"] == media
        ]
        if selected:
            metrics[f"accuracy_{media}"] = mean(selected)
    return Scores(metrics, scores.per_sample)


LETTER = Metric("letter", "2", "accuracy", _letters)
LIKELIHOOD = mean_metric("likelihood", lambda one: one.text in one.sample.expected)
CIRCULAR = Metric("mmbench_circular", "2", "accuracy", _circular)
SEED_BENCH = Metric("seed_bench", "2", "accuracy", _seed_bench)
