"""What surrounds a call must not reach the computation: torch's modes, forks, the process's end."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from owl2.engine.backends.weight_only_quantization import QuantizedLinear, quantize
from owl2.engine.engine_core import Prompt, Runner
from owl2.engine.model_runner import FastDecoder
from owl2.engine.sampling import SamplingParams
from owl2.errors import InputError
from tests.tiny import make_model

GREEDY = SamplingParams()
PROMPT = Prompt((1, 5, 9, 13))
TOKENS = 6


@pytest.fixture
def model():
    made = make_model(
        hidden_size=64, num_attention_heads=2, intermediate_size=80, initializer_range=0.4
    ).eval()
    assert FastDecoder(made).takes_prompts, "by kernels, whose numbers nobody checks"
    return made


def answer(runner, prompt=PROMPT):
    return runner.generate([prompt], GREEDY, [TOKENS], ())[0]


@pytest.mark.parametrize("length", [4, 100])
def test_autocast_around_a_call_changes_nothing(model, length):
    prompt = Prompt(tuple(3 + n % 30 for n in range(length)))
    expected = answer(Runner(model), prompt)
    with torch.autocast("cpu", torch.bfloat16):
        assert answer(Runner(model), prompt) == expected


def test_inference_mode_around_one_call_does_not_spoil_the_next(model):
    runner = Runner(model)
    with torch.inference_mode():
        first = answer(runner)
    assert answer(runner) == first


def test_after_a_fork_both_go_on(model):
    runner = Runner(model)
    expected = answer(runner)
    stream = runner.stream(PROMPT, GREEDY, TOKENS, ())
    next(stream)  # a row is in use
    with pytest.warns(DeprecationWarning) if sys.version_info >= (3, 12) else _nothing():
        child = os.fork()
    if not child:
        threading.Timer(60, os._exit, [2]).start()
        os._exit(0 if answer(runner) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert answer(runner) == expected


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_a_stream_that_pauses_at_the_end_of_the_process():
    script = """
        from owl2.engine.sampling import SamplingParams
        from owl2.engine.engine_core import Prompt, Runner
        from tests.tiny import make_model
        runner = Runner(make_model().eval())
        stream = runner.stream(Prompt((1, 2, 3)), SamplingParams(), 100, ())
        next(stream)
        print("bye")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr


@pytest.mark.parametrize("bits", [None, "8bit", "4bit"])
def test_numbers_that_are_none_are_said_so_with_any_bits(model, bits):
    if bits:
        quantize(model, bits)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        answer(Runner(model))


def test_a_cast_in_the_middle_of_an_answer_is_refused(model):
    runner = Runner(model)
    stream = runner.stream(PROMPT, GREEDY, TOKENS, ())
    next(stream)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="in the middle"):
        list(stream)
    assert len(answer(runner)) == TOKENS


def test_scales_stay_float32():
    linear = QuantizedLinear(torch.nn.Linear(64, 8), 8).to(torch.bfloat16)
    assert linear.scale.dtype == torch.float32
    assert linear.bias.dtype == torch.bfloat16


def test_whole_numbers_beside_plain_weights_of_any_width(model):
    """The kernels read whole numbers 64 at a time; a plain matrix may be of another width."""
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.in_features % 64, "or this shows nothing"
    layer.self_attn.q_proj = QuantizedLinear(layer.self_attn.q_proj, 8)
    runner = Runner(model)
    together = runner.generate([PROMPT, PROMPT], GREEDY, [TOKENS] * 2, ())
    assert together == [answer(runner)] * 2


def test_an_interruption_while_leading_is_the_leaders(model):
    """Ctrl-C in the middle of somebody else's score."""
    runner = Runner(model)
    told = []

    def interrupt(read):
        raise KeyboardInterrupt

    def score():
        try:
            runner.read(PROMPT, interrupt)
        except BaseException as error:
            told.append(error)

    stream = runner.stream(PROMPT, GREEDY, TOKENS, ())
    next(stream)
    worker = runner._worker
    with worker.lock:  # so that the thread cannot begin before the main one leads
        other = threading.Thread(target=score)
        other.start()
        while not runner._inbox._items:
            pass
    # Whoever comes first leads now; as the main thread it must be told, as the other nobody else.
    try:
        rest = list(stream)
    except (KeyboardInterrupt, RuntimeError):
        rest = None
    other.join(20)
    assert isinstance(told[0], RuntimeError)
    assert rest is None or len(rest) == TOKENS - 1
    assert len(answer(runner)) == TOKENS
