"""The thread of an engine core at the exit of the process."""

import subprocess
import sys
import textwrap


def test_the_process_exits_during_an_answer():
    script = """
        from owl2.engine.engine_core import EngineCore
        from tests.engine.conftest import stream_tokens
        from tests.tiny import make_model
        keep = []
        for max_tokens in (100, 1_000_000):
            core = EngineCore(make_model().eval())
            stream = stream_tokens(core, core.prepare([1, 2, 3]), max_tokens)
            next(stream)
            keep += [stream, keep]
        print("bye")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr


def test_the_process_exits_while_the_thread_frees_the_model():
    """The thread has the last reference to its core, so that it frees the model."""
    script = """
        import threading
        import time
        from owl2.engine.engine_core import EngineCore
        from owl2.engine.sampling_params import SamplingParams
        from owl2.engine.scheduler import Request
        from tests.tiny import make_model

        class Slow:
            def __del__(self):
                freeing.set()
                time.sleep(1)
                print("freed", flush=True)

        ended, continued, freeing = (threading.Event() for _ in range(3))

        def wait(error):
            ended.set()
            continued.wait(60)

        model = make_model().eval()
        model.slow = Slow()
        core = EngineCore(model)
        prompt = core.state(core.prepare([1, 2, 3]))
        request = Request(prompt, SamplingParams(), 1, [], model.device, 0)
        request.on_end = wait
        core.submit([request])
        ended.wait(60)
        del core, model, prompt, request
        continued.set()
        freeing.wait(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "freed\n"), done.stderr
