"""The standard tests of LangChain with langchain-openai."""

import base64

import httpx
import pytest
from conftest import KEY, MODEL, data_url
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


@pytest.fixture(autouse=True)
def local_image(monkeypatch):
    """The standard tests download an image."""
    data = base64.b64decode(data_url("red").partition(",")[2])
    monkeypatch.setattr(httpx, "get", lambda *args, **kwargs: httpx.Response(200, content=data))


class TestChatCompletions(ChatModelIntegrationTests):
    """With `/v1/chat/completions`."""

    chat_model_class = ChatOpenAI
    has_tool_calling = False
    has_structured_output = True
    structured_output_kwargs = {"method": "json_schema"}
    supports_image_inputs = True
    model_override_value = MODEL
    use_responses_api = False

    @pytest.fixture(autouse=True)
    def _set_url(self, base_url):
        type(self).base_url = base_url

    @property
    def chat_model_params(self):
        return {
            "model": MODEL,
            "base_url": self.base_url,
            "api_key": KEY,
            "max_retries": 0,
            "max_tokens": 200,
            "stream_usage": True,  # off by default for servers other than OpenAI's
            "use_responses_api": self.use_responses_api,
        }


class TestResponses(TestChatCompletions):
    """With `/v1/responses`."""

    use_responses_api = True


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_usage_and_image(base_url, image_url, use_responses_api):
    model = ChatOpenAI(
        model=MODEL, base_url=base_url, api_key=KEY, use_responses_api=use_responses_api
    )
    image = {"type": "image_url", "image_url": {"url": image_url}}
    message = HumanMessage([{"type": "text", "text": "what is this?"}, image])
    reply = model.invoke([message], max_tokens=8)
    assert reply.text
    assert reply.usage_metadata["output_tokens"] > 0
