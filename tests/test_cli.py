"""The command line as a user meets it: in a process of its own."""

import subprocess
import sys

import pytest
import typer

from owl2 import __version__, cli
from owl2.errors import InputError


def owl2(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "owl2", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version(argument):
    result = owl2(argument)
    assert (result.returncode, result.stdout) == (0, f"owl2 {__version__}\n")


@pytest.mark.parametrize("arguments", [["no-such-command"], ["version", "--no-such-option"]])
def test_wrong_usage_exits_with_2(arguments):
    result = owl2(*arguments)
    assert result.returncode == 2
    assert "No such" in result.stderr
    assert "Traceback" not in result.stderr


def run_main(monkeypatch, error: BaseException) -> int:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["owl2"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code


def test_input_error_is_one_line_and_exits_with_2(monkeypatch, capsys):
    message = "the picture [red]cat.png[/red] is broken: " + "give another one, " * 20
    assert run_main(monkeypatch, InputError(message)) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""


def test_interrupt_exits_with_130(monkeypatch):
    assert run_main(monkeypatch, KeyboardInterrupt()) == 130
