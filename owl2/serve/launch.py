"""`owl2 serve`, from its options to its exit code.

::

    options ──► port taken ──► keys, limits read ──► model loaded, asked once ──► served

What can be wrong with the options is found out before the weights are read, which takes minutes.
"""

import logging
import shlex
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.registry import look_up, read_setting
from owl2.serve.app import Settings, make_app
from owl2.serve.auth import Keys
from owl2.serve.limits import Limits
from owl2.serve.server import address_of, curl_line, serve, take_port
from owl2.serve.web.examples import read_examples

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Command:
    """What the command line says.

    Attributes:
        name: what the model is called; None: the directory's name, or the hub id.
        limits: `limit=value`, by the names of `Limits`.
        drain_seconds: to finish what runs, when it is to end.
        web: the web page, too.
        examples: a file of questions that the page begins with.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key_env: str | None = None
    api_key_file: Path | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    limits: Sequence[str] = ()
    drain_seconds: float = 30.0
    web: bool = False
    examples: Path | None = None


def serve_model(command: Command) -> int:
    """Serve until a signal ends it; the exit code: 0, or 1 where answers were cut off.

    Raises:
        InputError: what is wrong with the options, the model or the port.
    """
    limits = read_limits(command.limits)
    keys = _read_keys(command)
    name = command.name or _name_of(command.model)
    examples = None if command.examples is None else read_examples(command.examples)
    with take_port(command.host, command.port) as taken:
        url = address_of(taken)
        line = curl_line(url, name, _key_in_shell(command))
        print(f"Loading {command.model} ...", flush=True)
        engine = _load(command)
        app = make_app(engine, Settings(name, limits, keys, line))
        if command.web:
            from owl2.serve.web import mount

            mount(app, engine, limits, keys=keys, name=name, examples=examples)

        def say_where() -> None:
            precision = str(engine.model.dtype).removeprefix("torch.")
            print(f"{name} on {engine.model.device} in {precision} is at {url}/v1")
            print(f"The API is described at {url}/docs")
            if command.web:
                print(f"The web page is at {url}/web")
            print(f"Ask it something:\n{line}\nCtrl-C ends it.", flush=True)

        _log_to_stderr()
        if keys is None and command.host not in LOOPBACK:
            logging.getLogger(__name__).warning(
                "everyone who reaches this machine can ask: --api-key-file or --api-key-env "
                "would let in only who has a key"
            )
        return serve(
            app,
            app.state.desk,
            taken,
            drain_seconds=command.drain_seconds,
            on_start=say_where,
        )


def read_limits(words: Sequence[str]) -> Limits:
    """`limit=value` words → `Limits`.

    Raises:
        InputError: a limit that does not exist, or a value that it cannot have.
    """
    given = dict(read_setting(word) for word in words)
    for name in given:
        look_up("limit", name, Limits.model_fields)
    try:
        return Limits(**given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}={given.get(place)}: {first['msg']}.") from error


def _read_keys(command: Command) -> Keys | None:
    if command.api_key_env is not None and command.api_key_file is not None:
        raise InputError("Give the API keys by --api-key-env or by --api-key-file, not by both.")
    if command.api_key_env is not None:
        return Keys.from_env(command.api_key_env)
    if command.api_key_file is not None:
        return Keys.from_file(command.api_key_file)
    return None


def _key_in_shell(command: Command) -> str | None:
    """What a shell makes a key of: the line that is printed holds none itself."""
    if command.api_key_env is not None:
        return f"${{{command.api_key_env}%%,*}}"
    if command.api_key_file is not None:
        return f"$(grep -m 1 '^[^#]' {shlex.quote(str(command.api_key_file))})"
    return None


def _name_of(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _load(command: Command) -> Engine:
    """The engine, after a first token: what is slow or broken at first is so before anybody asks.

    All in a thread that ends then. OpenMP keeps threads for each thread that ever computed; those
    of the main thread, which will not compute again, would slow down the engine's (see `worker`).
    """

    loaded: Future[Engine] = Future()

    def load() -> None:
        try:
            engine = Engine.from_pretrained(
                command.model, device=command.device, dtype=command.dtype, quantize=command.quantize
            )
            engine.chat([{"role": "user", "content": "Hello?"}], max_new_tokens=1)
        except BaseException as error:  # it is raised where one waits
            loaded.set_exception(error)
        else:
            loaded.set_result(engine)

    # Ctrl-C ends the process without waiting for such a thread.
    thread = threading.Thread(target=load, name="owl2-load", daemon=True)
    thread.start()
    engine = loaded.result()
    thread.join()
    return engine


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("owl2.serve").setLevel(logging.INFO)
