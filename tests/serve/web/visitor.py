"""A visitor of the chat, without a browser."""

import asyncio
from contextlib import contextmanager
from html import unescape
from types import SimpleNamespace

import pytest
from PIL import Image

from owl2.serve.admission import AdmissionController
from owl2.serve.config import ServerLimits
from owl2.serve.metrics import Metrics
from owl2.serve.web.chat_handler import ChatHandler
from owl2.serve.web.conversation import Conversation

SETTINGS = ("en", 32, 0.0, 1.0, "")


class Visitor:
    """Asks questions and records what a browser would show.

    Attributes:
        conversation: In the server.
        box: The last value that the text box was set to.
        memory: What the browser sends back with each question.
    """

    def __init__(self, engine, decode=None, examples=(), decode_video=None, **limits):
        self.engine = engine
        self.admission = AdmissionController(engine, ServerLimits(**limits), Metrics())
        decode = decode or self.opened
        decoder = SimpleNamespace(decode=decode, decode_video=decode_video or decode)
        self.handler = ChatHandler(self.admission, decoder, examples)
        self.conversation = Conversation()
        self.box = "untouched"
        self.memory = []
        self.chats = []

    async def opened(self, data, budget):
        return Image.new("RGB", (8, 8), (data[0], 0, 0))

    def ask(self, question="what?", files=(), settings=SETTINGS):
        self.box = box = {"text": question, "files": [str(file) for file in files]}
        return self.begin(self.handler.ask(box, self.conversation, self.memory, *settings))

    def begin(self, views):
        async def see():
            async for view in views:
                self.see(view)

        return asyncio.ensure_future(see())

    def see(self, view):
        """Texts as a browser shows them."""
        contents = [row["content"] for row in view.rows]
        self.chats.append([one if isinstance(one, dict) else unescape(one) for one in contents])
        if "value" in view.box:
            self.box = view.box["value"]
        if isinstance(view.memory, list):
            self.memory = view.memory

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    async def submitted(self, count=1):
        await self.until(lambda: len(self.engine.requests) >= count)
        return self.engine.requests[count - 1]

    async def answered(self, *chunks, **question):
        """A question, answered."""
        count = len(self.engine.requests)
        task = self.ask(**question)
        request = await self.submitted(count + 1)
        for chunk in chunks:
            request.emit(chunk)
        request.end()
        await task
        return request


@contextmanager
def shows_error(needle):
    """Outside of a page, gradio turns an error notification into a warning."""
    with pytest.warns(UserWarning, match=needle):
        yield
