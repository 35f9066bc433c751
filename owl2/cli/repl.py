"""The interactive chat of `owl2 chat`."""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from PIL import Image

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import load_image
from owl2.processing.message_parts import TOKENS
from owl2.processing.messages import Message, user_message
from owl2.processing.processor import Owl2Processor
from owl2.processing.video import sample_frames

HELP = """\
Type a question and press Enter. Lines that start with / are commands:
  /image FILE   add an image (a file or a URL) to the next question; repeat it for several
  /video FILE   add a video (a file, a folder of frames or a URL), likewise
  /clear        start a new conversation
  /drop [N]     remove the oldest question and answer, or the N oldest
  /help         print this help
  /quit         exit (also Ctrl-D)
Ctrl-C stops an answer. <|image|> and <|video|> in a question are the positions of an image and a
video; without them, images come first and then videos. An empty question asks about these alone."""

PROMPT = "> "
# Placeholders of other models' formats.
OTHER_PLACEHOLDER = re.compile(
    r"<(?!\|(?:image|video)\|>)\|?(?:image|img|(video))\w*\|?/?>", re.IGNORECASE
)


def read_line(prompt: str) -> str:
    """The next line of stdin; if it is not a terminal, the line is printed as one does."""
    line = input(prompt)
    if not sys.stdin.isatty():
        print(line)
    return line


def placeholder_note(question: str) -> str:
    """A line about a placeholder that is plain text for this model; empty without one."""
    found = OTHER_PLACEHOLDER.search(question)
    if found is None:
        return ""
    kind = "video" if found[1] else "image"
    return (
        f"note: {found[0]} is sent as text. The placeholder of {kind}s is {TOKENS[kind]}; without "
        "it, they precede the question.\n"
    )


def load_frames(video: str, processor: Owl2Processor) -> list[Image.Image]:
    """The frames of a video, which later questions use again."""
    max_pixels = processor.image_processor.max_pixels
    return [load_image(one, max_pixels) for one in sample_frames(video, processor.num_frames)]


@dataclass
class Repl:
    """The state of an interactive chat, and its loop.

    Attributes:
        images: For the next question.
        read: Returns the next line for a prompt; EOFError ends the loop.
        write: Prints text.
        truncate_history: Drop the oldest turns of a conversation that exceeds the context.
        videos: The frames of each video for the next question.
    """

    engine: Engine
    options: dict[str, Any]
    images: list[Image.Image] = field(default_factory=list)
    read: Callable[[str], str] = read_line
    write: Callable[[str], Any] = lambda text: print(text, end="", flush=True)
    messages: list[Message] = field(default_factory=list)
    truncate_history: bool = False
    videos: list[list[Image.Image]] = field(default_factory=list)

    def run(self) -> None:
        """Process lines until the end; an invalid line prints an error."""
        with suppress(ImportError):  # not in every build of Python
            import_module("readline")  # line editing for input()
        while True:
            try:
                line = self.read(PROMPT).strip()
                if line == "/quit":
                    return
                self.handle_line(line)
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:  # at the prompt, or while a file is loaded
                self.write("\n(Ctrl-D or /quit exits)\n")
            except InputError as error:
                self.write(f"error: {error}\n")

    def handle_line(self, line: str) -> None:
        """Execute a command or answer a question.

        Raises:
            InputError: An unknown command, an unreadable image or video, or as `Engine.stream`. The
                conversation is then unchanged.
        """
        command, _, argument = line.partition(" ")
        if not line.startswith("/"):
            self._answer(line)
        elif command in ("/image", "/video"):
            self._add(command[1:], argument.strip())
        elif command == "/clear":
            self.messages, self.images, self.videos = [], [], []
            self.write("(new conversation)\n")
        elif command == "/drop":
            self._drop(argument.strip() or "1")
        elif command == "/help":
            self.write(HELP + "\n")
        else:
            raise InputError(f"unknown command {command}; see /help", ErrorCode.UNKNOWN_NAME)

    def _answer(self, question: str) -> None:
        if not (question or self.images or self.videos):
            return
        message = user_message(question, self.images, self.videos)
        if note := placeholder_note(question):
            self.write(note)
        history = self._truncate(message) if self.truncate_history else self.messages
        texts: list[str] = []
        try:
            # The question is stored after the answer, so that an error changes nothing.
            for text in self.engine.stream([*history, message], **self.options):
                texts.append(text)
                self.write(text)
        except KeyboardInterrupt:
            self.write(" (stopped)")
        except InputError as error:
            if error.code is not ErrorCode.TOO_LONG or not history:
                raise
            raise InputError(
                f"{error} /clear starts a new conversation; /drop removes its oldest question and "
                "answer; `owl2 chat --truncate-history` does so automatically.",
                error.code,
            ) from error
        finally:
            self.write("\n" if texts else "")
        answer = "".join(texts)
        if not answer.strip():
            self.write("(empty answer; the question is not stored)\n")
            return
        self.messages = [*history, message, {"role": "assistant", "content": answer}]
        self.images, self.videos = [], []

    def _truncate(self, message: Message) -> list[Message]:
        """The newest turns that leave room for an answer: a quarter of the context at most."""
        engine, history = self.engine, self.messages
        room = min(
            engine.sampling_params(**self.options).max_new_tokens, engine.context_length // 4
        )
        while history and (
            len(engine.processor.encode([*history, message]).ids) + room > engine.context_length
        ):
            history = history[2:]
        if count := (len(self.messages) - len(history)) // 2:
            self.write(f"(the oldest {count} of {len(self.messages) // 2} turns are dropped)\n")
        return history

    def _drop(self, argument: str) -> None:
        if not argument.isdecimal() or int(argument) < 1:
            raise InputError(
                f"/drop takes a number of turns, not {argument}", ErrorCode.INVALID_VALUE
            )
        self.messages = self.messages[2 * int(argument) :]
        self.write(f"({len(self.messages) // 2} questions are left)\n")

    def _add(self, kind: str, path: str) -> None:
        if not path:
            raise InputError(f"/{kind} needs a file: /{kind} FILE", ErrorCode.MISSING_VALUE)
        # Terminals quote a path that is dragged into them.
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1]
        processor = self.engine.processor
        if kind == "image":
            self.images.append(load_image(path, processor.image_processor.max_pixels))
        else:
            self.videos.append(load_frames(path, processor))
        count = len(self.images if kind == "image" else self.videos)
        self.write(f"({count} {kind}{'s' if count > 1 else ''} for the next question)\n")
