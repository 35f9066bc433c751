"""recipes/gpu_check.sh: the dry run on a CPU, and what a failed or stopped step means."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "gpu_check.sh"
STEPS = (
    *("environment", "golden", "full_size", "bits", "compiled", "fsdp2", "deepspeed_zero3"),
    *("lora_memory", "vllm_cuda"),
)


@pytest.fixture(scope="module")
def modules():
    """The modules `step` and `summary`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes" / "gpu_check")
        yield importlib.import_module("step"), importlib.import_module("summary")
    for name in ("step", "summary"):
        del sys.modules[name]


def run_step(step, tmp_path, check):
    """The exit code and the result of a step."""
    output = tmp_path / "step.json"
    with pytest.raises(SystemExit) as stopped:
        step.main(check, [str(tmp_path), "--output", str(output), "--dry"])
    return stopped.value.code, json.loads(output.read_text())


@pytest.mark.parametrize(
    ("value", "passed"),
    [(1.0, True), (2.0, True), (2.1, False), (0.9, False), (float("nan"), False)],
)
def test_a_value_outside_of_its_bounds_fails_the_step(modules, tmp_path, value, passed):
    step, _ = modules
    code, result = run_step(step, tmp_path, lambda one: one.check("error", value, least=1, most=2))
    assert code == (step.PASSED if passed else step.FAILED)
    assert result["status"] == ("passed" if passed else "failed")
    assert result["checks"][0]["passed"] is passed


def test_errors_and_missing_packages_are_recorded(modules, tmp_path):
    step, _ = modules

    def fail(one):
        one.values["before"] = 1
        raise RuntimeError("no memory")

    def skip(_):
        raise step.SkippedError("not installed")

    code, result = run_step(step, tmp_path, fail)
    assert (code, result["reason"]) == (step.FAILED, "RuntimeError: no memory")
    assert result["values"] == {"before": 1}
    code, result = run_step(step, tmp_path, skip)
    assert (code, result["status"], result["reason"]) == (step.SKIPPED, "skipped", "not installed")


def test_steps_without_a_result_are_failed_or_timed_out(modules, tmp_path):
    _, summary = modules
    (tmp_path / "golden.json").write_text(json.dumps({"status": "passed", "values": {"a": 1}}))
    lines = ["golden\t0\t7\t", "bits\t124\t60\ttime limit", "fsdp2\t139\t2\t"]
    (tmp_path / "steps.tsv").write_text("\n".join(lines) + "\n")
    steps = summary.collect(tmp_path)
    assert steps["golden"] == {"status": "passed", "values": {"a": 1}, "seconds": 7.0}
    assert steps["bits"] == {"status": "timed out", "seconds": 60.0, "reason": "time limit"}
    assert steps["fsdp2"] == {"status": "failed", "seconds": 2.0, "reason": "exit code 139"}


def test_a_checkpoint_that_was_not_finished_is_written_again(modules, tmp_path, monkeypatch):
    step, _ = modules
    partial = tmp_path / "checkpoint-tiny"
    partial.mkdir()
    existed = []
    monkeypatch.setattr(step.Step, "run", lambda *_: existed.append(partial.exists()))
    assert step.Step(True, tmp_path).checkpoint("tiny") == partial
    assert existed == [False]


def gpu_check(*arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPT, "--dry", *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_steps_that_find_no_time_do_not_run(tmp_path):
    run = gpu_check(tmp_path, GPU_CHECK_SECONDS="0")
    assert run.returncode == 1
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(
        STEPS, "timed out"
    )


def test_folders_with_other_files_are_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    for arguments in ([tmp_path], [tmp_path / "new", "--dry"], ["--help"]):
        assert gpu_check(*arguments).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.slow
def test_dry_run(tmp_path):
    run = gpu_check(tmp_path)
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    failed = {name: step for name, step in result["steps"].items() if step["status"] == "failed"}
    assert run.returncode == 0, failed
    assert (result["dry"], result["passed"]) == (True, True)
    statuses = {name: step["status"] for name, step in result["steps"].items()}
    assert statuses.pop("vllm_cuda") in ("skipped", "passed")  # vLLM may be installed
    assert statuses.pop("deepspeed_zero3") == "skipped"
    assert statuses == dict.fromkeys(set(STEPS) - {"vllm_cuda", "deepspeed_zero3"}, "passed")
    names = {one["name"] for one in result["steps"]["golden"]["checks"]}
    assert {"model_mha sdpa float32 image", "model_wide eager bfloat16 two_images"} <= names
    assert result["steps"]["bits"]["values"]["4bit"]["tokens_per_second"] > 0
    assert set(result["steps"]["fsdp2"]["values"]["losses"]) == {"plain", "fsdp2"}
