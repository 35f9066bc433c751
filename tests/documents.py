"""Fenced blocks of Markdown pages, and the `owl2` commands in them."""

import re

import typer

from owl2.cli import app

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks with this language; "" selects blocks without one."""
    return [content.rstrip("\n") for name, content in FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", text)


def commands(text: str, languages: tuple[str, ...] = ("",)) -> list[str]:
    """The `owl2` commands in the blocks of these languages.

    Comments are removed, and continued lines are joined.
    """
    joined = "\n".join(block for language in languages for block in blocks(text, language))
    lines = [line.split(" #")[0].strip() for line in joined.replace("\\\n", " ").splitlines()]
    return [
        line[line.index("owl2 ") :]
        for line in lines
        if line.startswith("owl2 ") or " -m owl2 " in line
    ]


def require_command(line: str) -> None:
    """Raises `AssertionError` if the command or one of its options does not exist."""
    command = typer.main.get_command(app)
    arguments = line.split()[1:]
    # A group such as `owl2 eval` can be a command with options as well.
    while hasattr(command, "commands") and not arguments[0].startswith("--"):
        name = arguments.pop(0)
        assert name in command.commands, f"unknown command {name}"
        command = command.commands[name]
    known = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    used = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    assert used <= known, f"unknown options in {line!r}: {used - known}"
