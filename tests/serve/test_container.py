"""The Dockerfile: linted, its files there, its steps the README's, its command one of ours.

No container is built: that needs a daemon and a registry.
"""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.documents import blocks, require_command

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# One instruction a line.
STEPS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()


def of(instruction):
    return [step.split(maxsplit=1)[1] for step in STEPS if step.startswith(f"{instruction} ")]


def lint(text):
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run(
        [hadolint, "--no-color", "-"], input=text, text=True, capture_output=True, check=False
    )


def test_the_linter_finds_nothing():
    found = lint(DOCKERFILE)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_linter_would_find_something():
    assert "DL3059" in lint(DOCKERFILE + "\nRUN pip list\nRUN pip check\n").stdout


def test_what_is_copied_is_there_and_goes_to_the_builder():
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = [name for step in of("COPY") for name in step.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "owl2"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in allowed), name


def test_what_is_installed_is_what_the_readme_says():
    """The same lines, but for what only a container's size is the reason for."""
    told = "\n".join(blocks((ROOT / "README.md").read_text(encoding="utf-8"), ""))
    told = [" ".join(line.split(" #")[0].split()) for line in told.splitlines()]
    steps = " && ".join(of("RUN")).replace(" --no-cache-dir", "")
    index = re.search(r"index=\((--extra-index-url \S+)\)", steps).group(1)
    installs = re.findall(r"pip install [^&]*", steps.replace('"${index[@]}"', index))
    assert len(installs) == 2
    for install in installs:
        assert " ".join(install.replace("'", "").split()) in [
            line.replace("'", "") for line in told
        ]


@pytest.mark.parametrize("flag", ["cpu", "cuda"])
def test_the_device_chooses_the_build_of_torch(flag):
    """The shell's own words, with pip replaced by echo."""
    step = next(step for step in of("RUN") if "pip install" in step).replace("pip install", "echo")
    told = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step],
        env={"DEVICE": flag, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("whl/cpu" in told) == (flag == "cpu")
    assert of("ARG") == ["DEVICE=cpu"]


def test_its_command_and_its_port_are_ours():
    entry, command = (json.loads(of(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    require_command(" ".join([*entry, *command]))
    port = command[command.index("--port") + 1]
    assert of("EXPOSE") == [port]
    assert f"127.0.0.1:{port}/health" in DOCKERFILE


def test_nobody_is_root():
    assert of("USER") == ["1000"]
    assert STEPS.index("USER 1000") > max(
        i for i, step in enumerate(STEPS) if "pip install" in step
    )
