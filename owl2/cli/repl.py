"""`owl2 chat`: one question, or a conversation on the terminal."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TextIO

from PIL import Image

from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import InputError
from owl2.processing.chat_template import Message, user_message, validate_prompt
from owl2.processing.image_io import load_image

HELP = """\
Write a question and press Enter. A line that begins with / is a command:
  /image FILE   add an image (a file or a URL) to the next question; several are possible
  /clear        forget the conversation and the images
  /help         this
  /quit         leave (also Ctrl-D)
Ctrl-C stops an answer. <|image|> in a question marks where an image goes; else they come first."""

PROMPT = "> "


def ask(
    settings: ModelArgs,
    question: str,
    images: Sequence[str],
    options: dict[str, Any],
    out: TextIO | None = None,
) -> None:
    """Write the answer to one question to `out` (default: stdout) as it is made, and a line's end.

    Raises:
        InputError: see `Engine.stream`.
    """
    out = out or sys.stdout
    if not question.strip():
        raise InputError("The question is empty: write what you want to know.")
    messages = [user_message(question, images)]
    validate_prompt(messages)
    processor = settings.load_processor()
    # Reading 16 GB of weights takes a while: a wrong path is better found before.
    for image in images:
        load_image(image, processor.image_processor.max_pixels)
    engine = Engine(settings.load_model(), processor, enable_prefix_caching=True)
    for piece in engine.stream(messages, **options):
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()


def converse(settings: ModelArgs, sources: Sequence[str], options: dict[str, Any]) -> None:
    """A conversation on the terminal, until Ctrl-D or /quit."""
    processor = settings.load_processor()
    limit = processor.image_processor.max_pixels
    images = [load_image(source, limit) for source in sources]
    engine = Engine(settings.load_model(), processor, enable_prefix_caching=True)
    with suppress(ImportError):  # Windows has none
        import_module("readline")  # gives input() its line editing
    print(f"{settings.model} on {engine.model.device}. /help says what can be done.")
    read = input if sys.stdin.isatty() else _read_aloud
    Conversation(engine, options, images, read).run()


def _read_aloud(prompt: str) -> str:
    """`input` for a script on stdin: what it says is shown, as if typed."""
    line = input(prompt)
    print(line)
    return line


@dataclass
class Conversation:
    """The state of a conversation on a terminal, and the loop that reads and answers.

    `images` wait for the next question. `read` gives a line for a prompt, `write` takes text.
    """

    engine: Engine
    options: dict[str, Any]
    images: list[Image.Image] = field(default_factory=list)
    read: Callable[[str], str] = input
    write: Callable[[str], Any] = lambda text: print(text, end="", flush=True)
    messages: list[Message] = field(default_factory=list)

    def run(self) -> None:
        """Read, answer, until the end. What goes wrong with one line is said, and it goes on."""
        while True:
            try:
                line = self.read(PROMPT).strip()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n(Ctrl-D or /quit leaves)\n")
                continue
            if line == "/quit":
                return
            try:
                self.take(line)
            except InputError as error:
                self.write(f"error: {error}\n")

    def take(self, line: str) -> None:
        """Do what a line says: a command, or a question.

        Raises:
            InputError: an unknown command, an image that cannot be read; see `Engine.stream`. The
                conversation is then as it was before.
        """
        command, _, argument = line.partition(" ")
        if not line.startswith("/"):
            self.answer(line)
        elif command == "/image":
            self._add_image(argument.strip())
        elif command == "/clear":
            self.messages, self.images = [], []
            self.write("(a new conversation)\n")
        elif command == "/help":
            self.write(HELP + "\n")
        else:
            raise InputError(f"there is no command {command}; /help lists them")

    def answer(self, question: str) -> None:
        """Ask, write the answer as it comes, and remember both."""
        if not question:
            return
        turn = user_message(question, self.images)
        pieces: list[str] = []
        try:
            # Not kept before the answer is there: an error must leave nothing behind.
            for piece in self.engine.stream([*self.messages, turn], **self.options):
                pieces.append(piece)
                self.write(piece)
        except KeyboardInterrupt:
            self.write(" (stopped)")
        finally:
            self.write("\n" if pieces else "")
        answer = "".join(pieces)
        if not answer.strip():
            self.write("(no answer; the question is forgotten)\n")
            return
        self.messages += [turn, {"role": "assistant", "content": answer}]
        self.images = []

    def _add_image(self, path: str) -> None:
        if not path:
            raise InputError("/image needs a file: /image FILE")
        # A path dragged into a terminal comes quoted.
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1]
        limit = self.engine.processor.image_processor.max_pixels
        self.images.append(load_image(path, limit))
        number = len(self.images)
        self.write(f"({number} image{'s' if number > 1 else ''} for the next question)\n")
