"""Run the command line in this process, as a user would from a shell."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class CliResult:
    """What a command returned: its exit code and everything it printed."""

    exit_code: int
    stdout: str
    stderr: str


RunCli = Callable[..., CliResult]


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """`run_cli("chat", "--model", path)` runs `owl2 chat --model PATH`."""

    from owl2 import cli  # imports torch, which pytest-xdist's controller does not need

    def run(*arguments: object) -> CliResult:
        monkeypatch.setattr(sys, "argv", ["owl2", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            exit_code = 0
        except SystemExit as stop:
            exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return CliResult(exit_code, captured.out, captured.err)

    return run
