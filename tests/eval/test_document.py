"""Document benchmarks: the metrics, and the files of DocDownstream-1.0."""

import json

import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.eval.metrics import document, find_metric
from owl2.eval.metrics.document import anls, relaxed_match, wtq_match
from owl2.eval.samples import Response
from owl2.eval.tasks import find_tasks
from tests.errors import raises_input_error
from tests.eval.reading import response

DUE = {
    "docvqa": "DocVQA",
    "infovqa": "InfographicsVQA",
    "wtq": "WikiTableQuestions",
    "deepform": "DeepForm",
    "kleister_charity": "KleisterCharity",
}
OTHERS = {"chartqa": "ChartQA", "tabfact": "TabFact", "visual_mrc": "VisualMRC"}


@pytest.mark.parametrize(
    ("response", "answers", "score"),
    [
        ("The Letter", ["the letter"], 1),
        ("a\nb", ["ab"], 1),
        ("abcd", ["abcx", "zzzz"], 0.75),
        ("abcd", ["abxy"], 0),  # half of the characters are not enough
        ("", [""], 1),
        ("abc", [""], 0),
    ],
)
def test_anls(response, answers, score):
    assert anls(response, answers) == score


@pytest.mark.parametrize(
    ("response", "answer", "is_correct"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("50%", "0.5", True),
        ("50", "0.5", False),
        ("0", "0", True),
        ("0.0", "0", False),  # a relative change from zero does not exist
        ("Blue", "blue", True),
        ("1,000", "1000", False),
    ],
)
def test_relaxed_accuracy(response, answer, is_correct):
    assert relaxed_match(response, answer) == is_correct


@pytest.mark.parametrize(
    ("response", "answers", "is_correct"),
    [
        (["3.0"], ["3"], True),
        (["Café (Paris)"], ["cafe"], True),
        (["“A”."], ["a"], False),  # the period is not removed before the quotation marks
        (["“A”"], ["a"], True),
        (["2001-xx-xx"], ["2001"], True),
        (["2001-5-06"], ["2001-05-06"], True),
        (["2001-13-06"], ["2001-13-6"], False),  # no month: texts
        (["a"], ["a", "b"], False),
        (["b", "a", "a"], ["a", "b"], True),
        (["x[1]"], ["x"], True),
    ],
)
def test_wtq(response, answers, is_correct):
    assert wtq_match(response, answers) == is_correct


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def conversation(question, answer):
    return {
        "image": ["./imgs/a.png"],
        "messages": [
            {"role": "user", "content": f"<|image|>{question}"},
            {"role": "assistant", "content": answer},
        ],
    }


def write_due(folder, name, questions, documents, answers=None):
    """`questions`: (document, question of the annotations)."""
    Image.new("RGB", (8, 8)).save(folder / "imgs" / "a.png")
    rows = [conversation(question, "?") for _, question in questions]
    jsonl(folder / "test" / f"{name}_test.jsonl", rows)
    described = [
        {
            "file_name": f"pages/{document}.pdf",
            "ground_truth": json.dumps({"gt_parses": [{"question": question}]}),
        }
        for document, question in questions
    ]
    jsonl(folder / "meta" / name / "test" / "metadata.jsonl", described)
    jsonl(folder / "meta" / name / "test" / "document.jsonl", documents)


@pytest.fixture(params=["", "DocDownstream-1.0"])
def folder(tmp_path, request):
    folder = tmp_path / request.param
    (folder / "imgs").mkdir(parents=True)
    return folder


def read(name, tmp_path):
    [task] = find_tasks(name)
    samples, invalid = task.read(task.data(tmp_path))
    assert not invalid
    return samples


def score(name, samples, texts):
    [task] = find_tasks(name)
    responses = [Response(sample, "", text) for sample, text in zip(samples, texts, strict=True)]
    return find_metric(task.config.metric).score(responses)


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_anls_of_files(folder, tmp_path, name):
    variants = [{"value": "x", "value_variants": ["May 1", "1 May"]}]
    documents = [{"name": "d1", "annotations": [{"key": "When?", "values": variants}]}]
    write_due(folder, DUE[name], [("d1", "When?")], documents)
    samples = read(name, tmp_path)
    assert [(one.question, list(one.expected)) for one in samples] == [
        ("When?", ["May 1", "1 May"])
    ]
    assert score(name, samples, ["may 1"]).metrics == {"ANLS": 1}


def test_wtq_of_files(folder, tmp_path):
    values = [{"value": "3"}]
    documents = [{"name": "d1", "annotations": [{"key": "How many?", "values": values}]}]
    write_due(folder, DUE["wtq"], [("d1", "How many?")], documents)
    samples = read("wtq", tmp_path)
    assert score("wtq", samples, ["3.0"]).metrics == {"accuracy": 1}


@pytest.mark.parametrize(
    ("name", "categories"),
    [
        ("deepform", ["advertiser", "gross_amount", "contract_num"]),
        ("kleister_charity", ["charity_name", "charity_number", "report_date"]),
    ],
)
def test_f1_of_categories(folder, tmp_path, name, categories):
    """Two of the three answers are right; of the two values, one is found."""
    annotations = [
        {"key": categories[0], "values": [{"value": "Acme", "value_variants": ["ACME Inc."]}]},
        {"key": categories[1], "values": [{"value": "12"}]},
    ]
    documents = [{"name": "d1", "annotations": annotations}]
    questions = [("d1", f"What is the {category}?") for category in categories]
    write_due(folder, DUE[name], questions, documents)
    samples = read(name, tmp_path)
    assert [list(one.expected) for one in samples] == [["Acme"], ["12"], ["None"]]
    found = score(name, samples, ["acme inc.", "13", "None"])
    assert found.metrics == {"F1": 0.5, "precision": 0.5, "recall": 0.5}
    assert found.per_sample == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "answer", "response", "expected"),
    [
        ("chartqa", "12.", "12.3", 1),
        ("tabfact", "True.", "True", 1),
        ("tabfact", "True", "true", 0),
    ],
)
def test_accuracy_of_files(folder, tmp_path, name, answer, response, expected):
    jsonl(folder / "test" / f"{OTHERS[name]}_test.jsonl", [conversation("Q?", answer)])
    Image.new("RGB", (8, 8)).save(folder / "imgs" / "a.png")
    samples = read(name, tmp_path)
    assert score(name, samples, [response]).metrics == {"accuracy": expected}


def test_scores_of_generated_text(folder, tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    answers = ["a long answer about cats", "nothing else is said here"]
    rows = [conversation("Q?", answer) for answer in answers]
    jsonl(folder / "test" / "VisualMRC_test.jsonl", rows)
    Image.new("RGB", (8, 8)).save(folder / "imgs" / "a.png")
    monkeypatch.setattr(document, "METEOR_VERSION", None)  # see below
    metrics = score("visual_mrc", read("visual_mrc", tmp_path), answers).metrics
    assert "METEOR" not in metrics
    assert metrics["CIDEr"] == pytest.approx(1000)
    assert metrics["BLEU-4"] == pytest.approx(100)
    assert metrics["ROUGE-L"] == pytest.approx(100)


@pytest.mark.slow  # java reads the table of paraphrases for 10 seconds
def test_meteor_equals_that_of_the_program_for_files():
    """The expected value is that of `java -jar meteor-1.5.jar FILE FILE -l en -norm`."""
    if document.METEOR_VERSION is None:
        assert "METEOR" not in document.TEXT.score([response("a", "a")]).metrics
        return
    rows = [
        response("The cat sat on the mat.", "the cat sat on the mat"),
        response("It is a small red house.", "a little red home it is"),
        response("", "nothing"),
    ]
    assert document.TEXT.score(rows).metrics["METEOR"] == pytest.approx(49.86834, abs=1e-4)


def test_other_numbers_of_rows_are_refused(folder, tmp_path):
    write_due(folder, DUE["docvqa"], [("d1", "When?")], [])
    jsonl(folder / "test" / "DocVQA_test.jsonl", [conversation("When?", "?")] * 2)
    with raises_input_error(ErrorCode.INVALID_FORMAT, 2, 1):
        read("docvqa", tmp_path)


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("metadata", {}),
        ("metadata", {"file_name": "d1.pdf", "ground_truth": "{}"}),
        ("metadata", {"file_name": "d1.pdf", "ground_truth": "text"}),
        ("document", {"annotations": []}),
        ("document", {"name": "d1", "annotations": [{"key": "When?"}]}),
    ],
)
def test_metadata_of_another_form_is_refused(tmp_path, file, row):
    (tmp_path / "imgs").mkdir()
    document = {"name": "d1", "annotations": [{"key": "When?", "values": []}]}
    write_due(tmp_path, DUE["docvqa"], [("d1", "When?")], [document])
    path = tmp_path / "meta" / DUE["docvqa"] / "test" / f"{file}.jsonl"
    jsonl(path, [row])
    with raises_input_error(ErrorCode.INVALID_FORMAT, path.parent):
        read("docvqa", tmp_path)
