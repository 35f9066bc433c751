"""Benchmarks of the paper that lmms-eval lacks, as tasks in its format.

The YAML files in ``tasks/`` refer to the class here. The data is searched in the directory
``OWL2_EVAL_DATA``, as with ``owl2 eval --data``:

``OWL2_EVAL_DATA=DIR python -m lmms_eval --include_path FOLDER --tasks msvd_qa --model owl2 ...``

FOLDER is `owl2.eval.adapters.additional_tasks`. The tasks work with all models of lmms-eval.
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

from owl2.errors import ErrorCode, InputError
from owl2.eval.samples import Response
from owl2.eval.tasks import find_tasks
from owl2.processing.image_io import load_image
from owl2.processing.messages import parse_messages

DATA = "OWL2_EVAL_DATA"


class PaperTask(ConfigurableTask):
    """The task of the same name in `owl2.eval.task_config`: its prompt, its data, its metric.

    Invalid samples, such as one with a missing image, are skipped and printed.

    Raises:
        InputError: The data is missing, has another format, or contains no valid sample.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        [self.eval_task] = find_tasks(str(config["task"]))
        settings = {name: value for name, value in config.items() if name != "class"}
        # Without stop strings: lmms-eval adds an empty line by default.
        settings["generation_kwargs"] = {
            "max_new_tokens": self.eval_task.config.max_new_tokens,
            "do_sample": False,
            "until": [],
        }
        settings |= {"dataset_path": self.eval_task.name, "test_split": "test"}
        settings["process_results"] = self.score_response
        super().__init__(config=settings)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Read the published files; nothing is downloaded."""
        folder, name = os.environ.get(DATA), self.eval_task.name
        data = self.eval_task.data(None if folder is None else Path(folder))
        self.samples, invalid = self.eval_task.read(data)
        for item in invalid:
            print(f"{name}: {item.id} is skipped: {item.reason}")
        if not self.samples:
            raise InputError(f"{name} has no valid samples.", ErrorCode.EMPTY_DATASET)
        rows = [
            {
                "index": index,
                "text": sample.messages[-1]["content"][-1]["text"],
                "expected": list(sample.expected),
            }
            for index, sample in enumerate(self.samples)
        ]
        self.dataset = {"test": Dataset.from_list(rows)}
        self.dataset_no_image = self.dataset

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """The question in the prompt of the task."""
        return str(doc["text"])

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """The first expected answer; "" where a judge decides."""
        return str(next(iter(doc["expected"]), ""))

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[Image.Image]:
        """The image, or the frames of the video in order."""
        images = parse_messages(self.samples[doc["index"]].messages).images
        return [load_image(image, alpha="drop") for image in images]

    def score_response(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """The metric of the task for one response; for a judge the data that it needs."""
        sample, text = self.samples[doc["index"]], results[0].strip()
        if self.eval_task.config.judge:
            return {"answers": {"sample": sample, "response": text}}
        scores = self.eval_task.metric.score([Response(sample, str(doc["text"]), text)])
        return {self.eval_task.metric.main: scores.per_sample[0]}


def write_mmhal(results: Sequence[Mapping[str, Any]], args: Any) -> int:
    """Write the responses to MMHal-Bench in the format of its authors; returns their number."""
    rows = [
        {
            "question_type": found["sample"].category,
            "image_content": [found["sample"].metadata["content"]],
            "question": found["sample"].question,
            "gt_answer": found["sample"].metadata["reference"],
            "model_answer": found["response"],
        }
        for found in results
    ]
    path = Path(generate_submission_file("mmhal_answers.json", args))
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"mmhal: {len(rows)} responses for a judge are in {path}")
    return len(rows)
