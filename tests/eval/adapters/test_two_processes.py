"""Two processes have the scores and responses of one, in both suites."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")
pytest.importorskip("lm_eval")

TASK = """\
task: numbers
dataset_path: json
test_split: test
dataset_kwargs: {data_files: {test: ROWS}}
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [a, b, c, d]
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
VISUAL = "doc_to_visual: !function seen.visual\n"
COMMANDS = {
    "owl2.eval.lm_eval": ("", ["--device", "cpu"]),
    "lmms_eval": (VISUAL, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", COMMANDS)
def test_two_processes_equal_one(suite, tiny_checkpoint, tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    rows = [{"text": "is it " * (1 + n % 3) + str(n), "gold": n % 4} for n in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more, arguments = COMMANDS[suite]
    task = TASK.replace("ROWS", str(tmp_path / "rows.json")) + more
    (tmp_path / "numbers.yaml").write_text(task)
    (tmp_path / "seen.py").write_text(
        f"from PIL import Image\ndef visual(doc): return [Image.open({str(tmp_path / 'a.png')!r})]"
    )
    environment = {
        **os.environ,
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    found = {}
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes), "-m", suite, "--model", "owl2"),
            *("--model_args", f"pretrained={tiny_checkpoint},dtype=float32", *arguments),
            *("--tasks", "numbers", "--include_path", str(tmp_path), "--batch_size", "2"),
            *("--output_path", str(out), "--log_samples"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        files = [*out.rglob("*results*.json")]
        assert len(files) == 1, done.stdout + done.stderr
        scores = json.loads(files[0].read_text())["results"]["numbers"]
        [samples] = out.rglob("*samples*.jsonl")
        answers = [json.loads(line) for line in samples.read_text().splitlines()]
        chosen = {row["doc_id"]: str(row["filtered_resps"])[:40] for row in answers}
        found[processes] = (scores["acc,none"], chosen)
    assert len(found[1][1]) == 5
    assert found[1] == found[2]
