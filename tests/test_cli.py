"""The command line: exit codes and output."""

import sys

import pytest
import typer

from owl2 import __version__, cli
from owl2.errors import ErrorCode, InputError


def test_version(run_cli):
    result = run_cli("version")
    assert (result.exit_code, result.stdout) == (0, f"owl2 {__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["version", "--no-such-option"], ["data", "show"], []]
)
def test_wrong_usage_exits_with_2(run_cli, arguments):
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert "Usage: owl2" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def replace_app(monkeypatch, error: BaseException) -> None:
    """Replace the application by a command that raises `error`."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)


def test_input_error_is_one_line_and_exits_with_2(monkeypatch, run_cli):
    message = "the image [red]cat.png[/red] is broken: " + "pass another one, " * 20
    replace_app(monkeypatch, InputError(message, ErrorCode.INVALID_VALUE))
    result = run_cli()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {message}\n"


def test_interrupt_exits_with_130(monkeypatch, run_cli):
    replace_app(monkeypatch, KeyboardInterrupt())
    assert run_cli().exit_code == 130


def test_other_errors_are_not_hidden(monkeypatch, run_cli):
    replace_app(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli()


def test_windows_is_refused_with_one_error(monkeypatch, run_cli):
    monkeypatch.setattr(sys, "platform", "win32")
    result = run_cli("--version")
    assert result.exit_code == 2
    assert "WSL" in result.stderr
    assert result.stdout == ""
