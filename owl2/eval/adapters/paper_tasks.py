"""Tasks for lmms-eval that it does not have: our readers' questions in its task format.

The YAMLs in ``tasks/`` name the class here; the data is looked for in the folder that the variable
OWL2_EVAL_DATA names, as ``owl2 eval --data`` does it:

``OWL2_EVAL_DATA=DIR python -m lmms_eval --include_path FOLDER --tasks msvd_qa --model owl2 ...``

FOLDER is what `owl2.eval.adapters.own_tasks` gives. The tasks are for any model of lmms-eval.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks._task_utils.file_utils import generate_submission_file
from PIL import Image

from owl2.errors import InputError
from owl2.eval.samples import Answer
from owl2.eval.tasks import find_tasks
from owl2.processing.chat_template import content_to_text, parse_messages
from owl2.processing.image_io import load_image

DATA = "OWL2_EVAL_DATA"


class PublishedTask(ConfigurableTask):
    """The recipe of the same name (`owl2.eval.task_config`): its prompt, its data, its metric.

    What cannot be asked, such as a question whose image is missing, is left out and named.

    Raises:
        InputError: the data is not there, or not as published, or holds nothing to ask.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        [self.own] = find_tasks(str(config["task"]))
        settings = {name: value for name, value in config.items() if name != "class"}
        # No ends of answers but the model's own, or lmms-eval adds an empty line.
        settings["generation_kwargs"] = {
            "max_new_tokens": self.own.recipe.max_new_tokens,
            "do_sample": False,
            "until": [],
        }
        settings |= {"dataset_path": self.own.name, "test_split": "test"}
        settings["process_results"] = self.scored
        super().__init__(config=settings)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Reads the published files; nothing is fetched."""
        folder = os.environ.get(DATA)
        questions, broken = self.own.read(self.own.source(None if folder is None else Path(folder)))
        for item in broken:
            print(f"{self.own.name}: {item.id} is left out: {item.reason}")
        if not questions:
            raise InputError(f"{self.own.name} has no question that can be asked.")
        self.questions = questions
        rows = [
            {
                "number": number,
                "id": question.id,
                "kind": question.kind,
                "words": content_to_text(
                    [part for part in _turn(question.messages) if part["type"] == "text"]
                ),
                "expected": list(question.expected),
            }
            for number, question in enumerate(questions)
        ]
        self.dataset = {"test": Dataset.from_list(rows)}
        self.dataset_no_image = self.dataset

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """The question in the recipe's words."""
        return str(doc["words"])

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """The first answer that is right; "" where a judge decides."""
        return str(next(iter(doc["expected"]), ""))

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[Image.Image]:
        """The image, or a video's frames, in order."""
        images = parse_messages(self.questions[doc["number"]].messages).images
        return [load_image(image) for image in images]

    def scored(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """The recipe's metric of one answer; where a judge decides, what it has to know."""
        question = self.questions[doc["number"]]
        if self.own.recipe.judge:
            return {"answers": {"question": question, "answer": results[0].strip()}}
        scores = self.own.metric.score([Answer(question, str(doc["words"]), results[0].strip())])
        return {self.own.metric.main: scores.each[0]}


def _turn(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return list(parse_messages(messages).turns[-1]["content"])


def write_mmhal(results: Sequence[Mapping[str, Any]], args: Any) -> int:
    """MMHal-Bench's answers in its authors' format, for their judge or ours; how many they are."""
    rows = [
        {
            "question_type": found["question"].kind,
            "image_content": [found["question"].facts["content"]],
            "question": found["question"].text,
            "gt_answer": found["question"].facts["reference"],
            "model_answer": found["answer"],
        }
        for found in results
    ]
    path = Path(generate_submission_file("mmhal_answers.json", args))
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"mmhal: {len(rows)} answers to be judged are in {path}")
    return len(rows)
