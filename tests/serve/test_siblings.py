"""The siblings of mPLUG-Owl2 are served: text, images, and videos."""

import openai
import pytest

from owl2.engine.engine import Engine
from owl2.processing.messages import user_message
from owl2.serve.app import build_app
from owl2.serve.config import ServerLimits
from tests.family import SIBLINGS, load_model, load_processor
from tests.serve.images import data_uri
from tests.serve.running import run_app
from tests.serve.test_chat_completions import CONVERSATIONS, QUESTION, engine_outputs, user
from tests.videos import make_gif


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_answers_equal_the_engines(sibling, tmp_path):
    engine = Engine(load_model(sibling), load_processor(sibling))
    gif = make_gif(tmp_path / "x.gif")
    url = data_uri(gif.read_bytes(), "data:video/gif;base64,")
    [video] = user(QUESTION)
    video["content"].insert(0, {"type": "video_url", "video_url": {"url": url}})
    cases = [(messages, messages) for messages in CONVERSATIONS.values()]
    cases.append(([video], [user_message(QUESTION, videos=[gif], num_frames=2)]))
    with (
        run_app(build_app(engine, "tiny", ServerLimits(num_frames=2))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        for messages, local in cases:
            reply = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=8, temperature=0
            )
            [expected] = engine_outputs(engine, local, max_new_tokens=8)
            assert reply.choices[0].message.content == expected.text
