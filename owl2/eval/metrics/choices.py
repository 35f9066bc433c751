"""Multiple-choice questions: the format of the options, and the letter that a response means.

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
from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Response

Parser = Callable[[str, Sequence[str]], str | None]

_W = "0-9A-Za-z_À-ɏ"  # of a word; Chinese has no boundaries between words
# A letter that is not part of a word. "A" and "I" are also words: as letters they end the response,
# or punctuation, a reason or Chinese text follows.
_LETTER = (
    rf"(?<![-{_W}])[\"'“‘(\[{{`]*(?:([B-HJ-Z])(?!-|['’]?[{_W}])|([AI])(?!['’]?[{_W}])(?=\s*(?:$|"
    rf"[^-\s{_W}]|(?:and|are|as|because|but|cannot|could|does(?:n't)?|for|is(?:n't)?|must|n?or|seems|"
    r"should|since|was(?:n't)?|would)\b)))[\"'”’)\]}`]*"
)
_ONE_OR_TWO = rf"{_LETTER}(?:\s*(?:/|\bor\b|\band\b|[和或与])\s*{_LETTER})?"
_LIST = rf"{_LETTER}(?:\s*(?:[,/、和或与]|\band\b|\bn?or\b)+\s*(?:option\s+)?{_LETTER})*"
# Letters that are wrong according to the response. They are removed first.
_NEGATED = tuple(
    re.compile(rule)
    for rule in (
        r"(?i:\b(?:not|neither|never|except|excluding|eliminat\w+|reject\w*|rul\w+ out|instead of|"
        r"rather than)|n['’]t)\s+(?i:(?:answer|be|both|choice|choose|either|option|pick|select|the)"
        rf"\s+)*{_LIST}",
        rf"{_LIST}\s+(?i:is|are|was|were|can|could|would|does|do|did|seems?)(?:n['’]t\b|not\b|(?:\s+"
        r"(?i:all|also|be|both|\w+ly))*\s+(?i:not|never|wrong|false|incorrect|invalid|inaccurate|"
        r"impossible|untrue|unlikely|irrelevant|(?:ruled\s+)?out|eliminated|excluded)\b)",
        rf"(?:不是|不选|不能选|不应选|并非|排除|而非)\s*(?:选项|答案)?\s*{_LIST}",
        rf"{_LIST}\s*(?:选项|项|答案)?(?:都|均|也|是|为|明显|显然)*(?:不|错|有误)",
    )
)
_BE = r"(?:[:=>]|(?i:\s*(?:is|was|be|(?:will|would|should|must|might|may|could|can only) be))\b)"
_STRONG_RULES = tuple(
    re.compile(rule)
    for rule in (
        r"\\boxed\{(?:\\text\{)?\(?([A-Z])\b",
        rf"\b(?i:answer|selected|selection|correct (?:option|choice|letter|one))\s*{_BE}*\s*"
        rf"(?i:(?:the|option|choice|letter|\w+ly)\s+)*{_ONE_OR_TWO}",
        rf"(?:答案|正确的?选项|应该?选|我选)(?:应该|应当|应|只能|可能)?[是为选:=\s]*(?:选项)?\s*{_ONE_OR_TWO}",
        rf"{_LETTER}[.:]?\s*(?i:is|['’]s|must be|would be|seems|appears)(?:\s+(?i:to be|\w+ly|the|"
        r"most|only|best|also))*\s+(?i:correct|right|true|answer|best|accurate|likely)\b",
        rf"{_LETTER}\s*(?:选项|项)?[是为]?(?:正确|对的|最佳|答案)",
    )
)
_WEAK_RULES = tuple(
    re.compile(rule)
    for rule in (
        r"(?i:\banswer\s*(?:is|:))\s*[(\[]?([a-z])(?=[)\]]?\s*(?:$|[.,;!\n]))",
        rf"\b(?i:option|choice)\s+{_ONE_OR_TWO}",
        rf"\b(?i:choose|chose|pick|select|go(?:ing)? (?:with|for)|opt for|settle on|vote for)\s+"
        rf"(?i:(?:the|option|choice|answer|letter)\s+)*{_ONE_OR_TWO}",
        rf"选(?:择|项)?[:是为\s]*{_ONE_OR_TWO}",
        rf"{_LETTER}\s*选?项",
        rf"[是为]\s*{_LETTER}\W*$",
        rf"(?:^|[.;\n]\s*){_LETTER}\s+(?:as|because|is|since)\b",
        r"(?i:\b(?:be|but|certainly|clearly|definitely|guess|hence|is|it['’]s|maybe|no|now|obviously|"
        r"ok|okay|perhaps|prediction|probably|response|result|say|so|sure|surely|then|therefore|"
        rf"think|thus|yes))\s*[,:]?\s*{_LETTER}\W*$",
        r"[(\[]([A-Z])[)\]]",
    )
)
_NEXT = r"(?!\s*(?:(?:or|and|[&,/和或])\s*)?[(\[]?[A-Z](?:\W*$|[.,:;)\]/]))"  # no second letter
_LEADING = re.compile(rf"\W*(?:([A-Za-z])(?:\W*$|[)\]]?\s*[.:)\]、]{_NEXT}|\s*\n)|([A-Z]),{_NEXT})")


def with_options(question: str, options: Sequence[str]) -> str:
    """The question and a line "A. ..." for each option (Specification §1.5)."""
    return "\n".join([question, *map("{}. {}".format, LETTERS, options)])


def parse_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a response in English or Chinese means; None if ambiguous.

    A list of options that the response repeats, and letters that it calls wrong ("A is incorrect",
    "not A"), are removed. Then the first rule that finds a letter decides:

    1. The response contains "the answer is B", "B is correct", "答案是B", and no other letter in
       the same form.
    2. It starts with a letter, followed by its end, ":", ".", ")", "、", a comma, a new line or the
       text of that option.
    3. It contains "option B", "I choose B", "选B", "B because ..." or "(B)", or ends with "so B",
       and no other letter in the same form.
    4. It contains the text of one option and of no other.

    Args:
        options: Their texts, in order; the letter of the first is A.
    """
    letters = LETTERS[: len(options)]
    text, *options = (unicodedata.normalize("NFKC", one) for one in (text, *options))
    text = _without_lists(text.replace("*", "").strip(), options)  # "**B**" is Markdown
    for rule in _NEGATED:
        text = rule.sub("~", text)
    text = text.strip()
    for rules in (_STRONG_RULES, _WEAK_RULES):
        for rule in rules:
            groups = (found.groups() for found in rule.finditer(text))
            named = {letter.upper() for found in groups for letter in found if letter}
            if named & set(letters):
                return named.pop() if len(named) == 1 else None
        if rules is _STRONG_RULES and (letter := _leading_letter(text, options)):
            return letter
    mentioned = _mentioned_options(text, options)
    return letters[mentioned[0]] if len(mentioned) == 1 else None


def _leading_letter(text: str, options: Sequence[str]) -> str | None:
    by_letter = dict(zip(LETTERS, options, strict=False))
    found = re.match(r"\W*([A-Z])[\s.:)\]、,-]*(.+)", text, re.DOTALL)
    if found is None or _normalize(found[2]) != _normalize(by_letter.get(found[1], "")):
        found = _LEADING.match(text)
    letter = (found[1] or found[2]).upper() if found else None
    return letter if letter in by_letter else None


def _without_lists(text: str, options: Sequence[str]) -> str:
    """The text without two or more options in a row, each with its letter ("A. red, B. green").

    In a list of lines the texts may differ from those of the options.
    """
    named = [
        rf"{letter}[)\].:、,\s-]+" + r"\s+".join(map(re.escape, option.split()))
        for letter, option in zip(LETTERS, options, strict=False)
        if option.strip()
    ]
    item = rf"(?<![-{_W}])[(\[]?(?i:(?=\w)({'|'.join(named)}))(?![{_W}])"
    line = rf"(?m:^)\W*?([{LETTERS[: len(options)]}][).:、][^\n]+)(?=\n|$)"
    for pattern, gap in ((item, r"[\s,;.、。/|-]*(?:and|or|和|或)?\s*"), (line, r"\s*")):
        run: list[re.Match[str]] = []
        kept, start = "", 0
        for found in [*re.finditer(pattern, text), None]:
            is_next = (
                found is not None
                and run
                and re.fullmatch(gap, text[run[-1].end() : found.start()])
                and found[1][0].upper() not in {item[1][0].upper() for item in run}
            )
            if not is_next:
                if len(run) > 1:
                    kept, start = kept + text[start : run[0].start()] + "\n", run[-1].end()
                run = []
            if found is not None:
                run.append(found)
        text = kept + text[start:]
    return text.strip()


def _mentioned_options(text: str, options: Sequence[str]) -> list[int]:
    """Indices of the options in the text, without those after "not".

    "dog house" does not mention the option "dog".
    """
    rest, normalized = _normalize(text), [_normalize(option) for option in options]
    found = []
    for index in sorted(range(len(options)), key=lambda index: -len(normalized[index])):
        option = normalized[index]
        pattern = (
            r"((?:\b(?:not|never|neither|nor|no)\b|n['’]t\b|不是|没有|并非)\s*(?:an?|the)?\s*)?"
            rf"(?<![{_W}]){re.escape(option)}(?![{_W}])"
        )
        if option and any(match[1] is None for match in re.finditer(pattern, rest)):
            found.append(index)
        if option and normalized.count(option) == 1:
            rest = re.sub(pattern, "|", rest)
    return found


def _normalize(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def parse_letter_mmbench(text: str, options: Sequence[str]) -> str | None:
    """The letter by the rule of VLMEvalKit, the official scorer of MMBench; else `parse_letter`.

    The rule: the only letter of an option among the words of the response, if it is one of the last
    four words or follows "answer is"; or else the only option whose text a short response contains.
    VLMEvalKit passes other responses to a language model, here to `parse_letter`.
    """
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
CIRCULAR = Metric("mmbench_circular", "2", "accuracy", _circular)
SEED_BENCH = Metric("seed_bench", "2", "accuracy", _seed_bench)
