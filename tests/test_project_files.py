"""Project files agree with each other: versions, workflows, and Makefile targets."""

import re
from pathlib import Path

import pytest
import yaml

import owl2

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def load(path: str):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def commands_of(workflow: Path) -> list[str]:
    """The `make` targets of a workflow's steps, with matrix values inserted."""
    commands = []
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for row in rows:
            for step in job["steps"]:
                run = step.get("run", "")
                for key, value in row.items():
                    run = run.replace(f"${{{{ matrix.{key} }}}}", value)
                commands += re.findall(r"^make ([\w-]+)$", run, re.MULTILINE)
    return commands


def test_workflows_call_existing_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    called = {target for workflow in WORKFLOWS for target in commands_of(workflow)}
    assert {"check", "test", "test-oldest", "test-browser", "site"} <= called <= targets


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_pins_actions_and_limits_permissions(workflow):
    text = workflow.read_text(encoding="utf-8")
    uses = re.findall(r"uses: (\S+)", text)
    assert uses
    assert not [action for action in uses if not re.search(r"@(?:release/)?v\d+$", action)]
    content = yaml.safe_load(text)
    assert content["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in content["jobs"].values())


def test_pre_commit_uses_the_ruff_version_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^ruff==(.+)$", constraints, re.MULTILINE)
    repos = {repo["repo"]: repo["rev"] for repo in load(".pre-commit-config.yaml")["repos"]}
    assert repos["https://github.com/astral-sh/ruff-pre-commit"] == f"v{pinned[1]}"


def test_citation_has_the_version_and_the_paper():
    citation = load("CITATION.cff")
    assert citation["version"] == owl2.__version__
    paper = citation["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2311.04257"
    assert paper["title"].startswith("mPLUG-Owl2")


def test_changelog_has_the_current_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert owl2.__version__ in text
