"""Runs only in the environment of `make test-peers`, which contains the tests of other projects."""

import sysconfig
from pathlib import Path

import pytest

from tests.peers.sources import SOURCES, add_to_path
from tests.peers.summary import Summary

# Marks in the sources of transformers and PEFT.
MARKS = (
    "generate", "is_pipeline_test", "is_training_test", "flash_attn_test", "flash_attn_3_test",
    "flash_attn_4_test", "all_flash_attn_test", "torch_compile_test", "torch_export_test",
    "onnx_export_test", "executorch_export_test", "accelerate_tests", "single_gpu_tests",
    "multi_gpu_tests", "bitsandbytes", "is_tensor_parallel_test", "is_staging_test", "asyncio",
)  # fmt: skip

if SOURCES.exists():
    add_to_path()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers or PEFT")
    if SOURCES.exists():
        config.pluginmanager.register(Summary())
    if not hasattr(config, "workerinput"):
        # optimum-quanto compiles its kernels at their first use. A build that was killed leaves a
        # lock, for which the next build waits forever.
        packages = Path(sysconfig.get_path("purelib"))
        for lock in packages.glob("optimum/quanto/library/extensions/*/build/lock"):
            lock.unlink()


def pytest_collection_modifyitems(config, items):
    deselected = []
    for item in items:
        if "tests/peers/" in item.path.as_posix():
            item.add_marker(pytest.mark.peers)
            selected = getattr(item.cls, "selected_tests", ())
            if selected and item.originalname not in selected:
                deselected.append(item)
    config.hook.pytest_deselected(items=deselected)
    skipped = set(deselected)
    items[:] = [item for item in items if item not in skipped]
