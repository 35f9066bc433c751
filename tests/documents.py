"""What tests of written pages share: their fenced blocks, and the commands in them."""

import typer

from owl2.cli import app


def blocks(text, language):
    """The fenced blocks of a language; "" are those of none."""
    found, inside = [], None
    for line in text.splitlines():
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside, opened = [], line.removeprefix("```")
        else:
            found += ["\n".join(inside)] if opened == language else []
            inside = None
    return found


def commands(text, languages=("",)):
    """The lines that call `owl2`, without comments, continued lines joined."""
    joined = "\n".join(block for language in languages for block in blocks(text, language))
    lines = [line.split(" #")[0].strip() for line in joined.replace("\\\n", " ").splitlines()]
    return [line[line.index("owl2 ") :] for line in lines if calls_owl2(line)]


def calls_owl2(line):
    return line.startswith("owl2 ") or " -m owl2 " in line


def require_command(line):
    """Fails if the command or one of its options does not exist."""
    command = typer.main.get_command(app)
    words = line.split()[1:]
    # A group; one that has options of its own is a command, too.
    while hasattr(command, "commands") and not words[0].startswith("--"):
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    known = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= known
