"""`owl2 serve`, from its configuration to its exit code.

::

    options ──► bind the port ──► read the keys ──► load the model, warm it up ──► serve

Errors in the options are reported before the weights are loaded, which can take minutes.
"""

import logging
import shlex

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerConfig
from owl2.serve.server import bind_socket, curl_example, serve, socket_url
from owl2.serve.web.examples import read_examples

LOOPBACK = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger(__name__)


def serve_model(config: ServerConfig) -> int:
    """Serve until a signal arrives.

    Returns:
        The exit code: 0 if every request was finished, otherwise 1.

    Raises:
        InputError: An option, the model or the port is invalid.
    """
    name = config.model_name
    api_keys = _read_keys(config)
    examples = None if config.examples is None else read_examples(config.examples)
    with bind_socket(config.host, config.port) as bound:
        url = socket_url(bound)
        example = curl_example(url, name, _key_in_shell(config))
        print(f"Loading {config.model} ...", flush=True)
        engine = Engine.from_pretrained(
            config.model, device=config.device, dtype=config.dtype, quantize=config.quantize
        )
        # The first token reports errors and pays one-time costs before the first request.
        engine.chat([{"role": "user", "content": "Hello?"}], max_new_tokens=1)
        app = build_app(engine, name, config.limits, api_keys, example)
        if config.web:
            from owl2.serve.web.mount import mount

            mount(app, engine, config.limits, keys=api_keys, name=name, examples=examples)

        def print_urls() -> None:
            dtype = str(engine.model.dtype).removeprefix("torch.")
            print(f"Serving {name} on {engine.model.device} in {dtype} at {url}/v1")
            print(f"API documentation: {url}/docs")
            if config.web:
                print(f"Web page: {url}/web")
            print(f"Example request:\n{example}\nPress Ctrl-C to stop.", flush=True)

        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        logging.getLogger("owl2.serve").setLevel(logging.INFO)
        if api_keys is None and config.host not in LOOPBACK:
            logger.warning(
                "the server accepts requests from every client that reaches this machine; require "
                "API keys with --api-key-file or --api-key-env"
            )
        admission = app.state.admission
        return serve(app, admission, bound, config.shutdown_timeout, on_start=print_urls)


def _read_keys(config: ServerConfig) -> ApiKeys | None:
    if config.api_key_env is not None and config.api_key_file is not None:
        raise InputError("--api-key-env and --api-key-file exclude each other.", ErrorCode.CONFLICT)
    if config.api_key_env is not None:
        return ApiKeys.from_env(config.api_key_env)
    if config.api_key_file is not None:
        return ApiKeys.from_file(config.api_key_file)
    return None


def _key_in_shell(config: ServerConfig) -> str | None:
    """A shell expression for an API key: the printed example must not contain the key itself."""
    if config.api_key_env is not None:
        return f"${{{config.api_key_env}%%,*}}"
    if config.api_key_file is not None:
        return f"$(grep -m 1 '^[^#]' {shlex.quote(str(config.api_key_file))})"
    return None
