"""The command line as a user meets it: exit codes and what is printed."""

import subprocess
import sys

import pytest
import typer

from owl2 import __version__, cli
from owl2.errors import InputError


def exit_code(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["owl2", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_the_package_runs_as_a_program():
    command = [sys.executable, "-m", "owl2", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, f"owl2 {__version__}\n")


def test_version(monkeypatch, capsys):
    assert exit_code(monkeypatch, "version") == 0
    assert capsys.readouterr().out == f"owl2 {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["version", "--no-such-option"], ["data", "show"], []]
)
def test_wrong_usage_exits_with_2(monkeypatch, capsys, arguments):
    assert exit_code(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert "Usage: owl2" in shown.out + shown.err
    assert "Traceback" not in shown.err


def exit_code_of_a_command_that_raises(monkeypatch, error: BaseException) -> int:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    return exit_code(monkeypatch)


def test_input_error_is_one_line_and_exits_with_2(monkeypatch, capsys):
    message = "the image [red]cat.png[/red] is broken: " + "give another one, " * 20
    assert exit_code_of_a_command_that_raises(monkeypatch, InputError(message)) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""


def test_interrupt_exits_with_130(monkeypatch):
    assert exit_code_of_a_command_that_raises(monkeypatch, KeyboardInterrupt()) == 130


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["owl2"])
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()
