"""The Dockerfile: linter, copied files, installation steps and command.

The tests do not build the image, which needs a daemon and a registry.
"""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.documents import require_command

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# One instruction per line.
STEPS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()


def arguments_of(instruction):
    return [step.split(maxsplit=1)[1] for step in STEPS if step.startswith(f"{instruction} ")]


def lint(text):
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run(
        [hadolint, "--no-color", "-"], input=text, text=True, capture_output=True, check=False
    )


def test_linter_reports_nothing():
    found = lint(DOCKERFILE)
    assert (found.returncode, found.stdout) == (0, "")


def test_linter_reports_a_bad_dockerfile():
    assert "DL3059" in lint(DOCKERFILE + "\nRUN pip list\nRUN pip check\n").stdout


def test_copied_files_exist_and_are_not_ignored():
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = [name for step in arguments_of("COPY") for name in step.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "owl2"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in allowed), name


def test_installation_steps_equal_the_documented_ones():
    """Except for options that only reduce the size of the image, and for fewer extras."""
    page = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    documented = [line.split() for line in page.splitlines() if line.startswith("pip install")]
    steps = " && ".join(arguments_of("RUN")).replace(" --no-cache-dir", "")
    index = re.search(r"index=\((--extra-index-url \S+)\)", steps).group(1)
    steps = steps.replace('"${index[@]}"', index)
    torch, package = (step.split() for step in re.findall(r"pip install [^&]*", steps))
    assert torch in documented
    *command, target = package
    targets = [line[-1] for line in documented if line[:-1] == command]
    extras = [set(re.findall(r"\w+", one)) for one in targets]
    assert any(set(re.findall(r"\w+", target)) <= all_extras for all_extras in extras)


@pytest.mark.parametrize("flag", ["cpu", "cuda"])
def test_device_argument_selects_the_build_of_torch(flag):
    """The step runs in a shell in which echo replaces pip."""
    step = next(step for step in arguments_of("RUN") if "pip install" in step).replace(
        "pip install", "echo"
    )
    lines = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step],
        env={"DEVICE": flag, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("whl/cpu" in lines) == (flag == "cpu")
    assert arguments_of("ARG") == ["DEVICE=cpu"]


def test_command_and_port_are_valid():
    entry, command = (json.loads(arguments_of(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    require_command(" ".join([*entry, *command]))
    port = command[command.index("--port") + 1]
    assert arguments_of("EXPOSE") == [port]
    assert f"127.0.0.1:{port}/health" in DOCKERFILE


def test_container_does_not_run_as_root():
    assert arguments_of("USER") == ["1000"]
    assert STEPS.index("USER 1000") > max(
        i for i, step in enumerate(STEPS) if "pip install" in step
    )
