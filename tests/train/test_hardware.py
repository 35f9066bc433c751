"""The devices of an estimate."""

import pytest

from owl2.errors import ErrorCode
from owl2.train.estimate.hardware import GIB, Hardware, parse_size
from tests.errors import raises_input_error


@pytest.mark.parametrize(
    ("text", "size"),
    [("80G", 80 * GIB), ("24gb", 24 * GIB), ("1.5 GiB", 1.5 * GIB), ("512M", GIB / 2), ("7", 7)],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "G", "-3G", "0G", "80X", "8 0G"])
def test_invalid_size_is_refused(text):
    with raises_input_error(ErrorCode.INVALID_FORMAT, repr(text), "80G"):
        parse_size(text)


def test_known_gpu_has_memory_and_speed():
    hardware = Hardware.from_options(gpus=8, gpu="H100")
    assert hardware.memory == 80 * GIB
    assert hardware.flops_per_second == pytest.approx(8 * 0.4 * 989e12)
    assert hardware.title == "8 x H100, 80 GiB"
    assert Hardware.from_options(gpu="h100", tflops=500).flops_per_second == 500e12


def test_options_override_the_known_gpu():
    hardware = Hardware.from_options(gpu="a100", memory="40G")
    assert hardware.memory == 40 * GIB
    assert hardware.fits(36 * GIB) and not hardware.fits(39 * GIB)


def test_unknown_hardware_has_no_memory_and_speed():
    hardware = Hardware.from_options()
    assert (hardware.memory, hardware.flops_per_second, hardware.fits(1)) == (None, None, None)


def test_zero_gpus_are_a_cpu():
    assert Hardware.from_options(gpus=0).device_type == "cpu"
    assert Hardware.from_options(gpus=0).devices == 1


def test_unknown_gpu_is_refused():
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "h10", "h100"):
        Hardware.from_options(gpu="h10")
