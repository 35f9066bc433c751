"""IQA-PyTorch's own code and `ImageScorer` give the same scores for the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from owl2.scoring.scorer import ImageScorer
from tests.scoring.golden import FAMILY, image_files

MODEL = FAMILY / "one_align" / "model"


def test_scores_of_pyiqa():
    files = image_files("one_align", ["wide", "tall", "square", "large"])
    script = Path(__file__).with_name("pyiqa_scores.py")
    command = [sys.executable, str(script), str(MODEL), *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = json.loads(run.stdout.splitlines()[-1])["scores"]
    scorer = ImageScorer.from_pretrained(
        MODEL, "cpu", "float32", method="q-align", prompt_form="pyiqa"
    )
    for task, name in (("quality", "quality"), ("aesthetics", "aesthetic")):
        ours = [score.score for score in scorer.score(files, task)]
        assert ours == pytest.approx(theirs[name], abs=1e-4)
    assert theirs["quality"] != pytest.approx(theirs["aesthetic"], abs=1e-2)
