"""Machines that runs are planned for."""

import pytest

from owl2.errors import InputError
from owl2.train.estimate.hardware import GIB, Hardware, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("80G", 80 * GIB), ("24gb", 24 * GIB), ("1.5 GiB", 1.5 * GIB), ("512M", GIB / 2), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "G", "-3G", "0G", "80X", "8 0G"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="write it as 80G"):
        parse_size(text)


def test_a_known_gpu_has_memory_and_speed():
    machine = Hardware.from_options(gpus=8, gpu="H100")
    assert machine.memory == 80 * GIB
    assert machine.speed == pytest.approx(8 * 0.4 * 989e12)
    assert machine.title == "8 x H100 of 80 GiB"
    assert Hardware.from_options(gpu="h100", tflops=500).speed == 500e12


def test_what_is_said_counts_more():
    machine = Hardware.from_options(gpu="a100", memory="40G")
    assert machine.memory == 40 * GIB
    assert machine.holds(36 * GIB) and not machine.holds(39 * GIB)


def test_without_a_word_nothing_is_known():
    machine = Hardware.from_options()
    assert (machine.memory, machine.speed, machine.holds(1)) == (None, None, None)


def test_no_gpu_is_a_cpu():
    assert Hardware.from_options(gpus=0).kind == "cpu"
    assert Hardware.from_options(gpus=0).devices == 1


def test_an_unknown_gpu_is_refused():
    with pytest.raises(InputError, match="Do you mean 'h100'"):
        Hardware.from_options(gpu="h10")
