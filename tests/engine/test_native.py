"""The CPU kernels are compiled, and the variant for the CPU is chosen."""

import pytest

from owl2.engine.backends.native import build


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # -O3 takes many seconds.
    monkeypatch.setattr(build, "FLAGS", build.FLAGS[1:])
    for function in (build.kernels, build.available):
        function.cache_clear()
    yield tmp_path / "owl2"
    for function in (build.kernels, build.available):
        function.cache_clear()


def test_the_library_is_compiled_once(empty_cache, capfd, monkeypatch):
    assert build.available()
    assert "compiling the CPU kernels" in capfd.readouterr().err
    [library] = empty_cache.glob("kernels-*.so")
    build.kernels.cache_clear()
    monkeypatch.setattr(build, "compile_into", None)  # not called by the second start
    build.library()
    assert capfd.readouterr().err == ""
    assert [*empty_cache.iterdir()] == [library]


def test_without_a_compiler_a_message_is_printed_once(empty_cache, capfd, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not build.available()
    assert not build.available()
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    assert "no-such-compiler" in message


def test_a_compiler_that_fails(empty_cache, monkeypatch, tmp_path):
    failing = tmp_path / "broken"
    failing.write_text('#!/bin/sh\necho "line 1: no" >&2\nexit 1\n')
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(build.BuildError, match="line 1: no"):
        build.library()
    assert not list(empty_cache.glob("kernels-*"))


def test_a_cache_that_cannot_be_written(empty_cache, monkeypatch):
    (empty_cache.parent / "owl2").write_text("a file, not a directory")
    with pytest.raises(build.BuildError, match="owl2"):
        build.library()


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("", "x86-64-v4-amx"),
        ("amx_int8", "x86-64-v4-bf16"),
        ("avx512_bf16", "x86-64-v4-vnni"),
        ("avx512_vnni", "x86-64-v4"),
        ("avx512f", "x86-64-v3-vnni"),
        ("avx512f avx_vnni", "x86-64-v3"),
        ("avx512f avx_vnni fma", "x86-64-v2"),
        ("avx512f avx_vnni fma ssse3", None),
    ],
)
def test_the_variant_is_the_best_that_the_cpu_supports(missing, expected, monkeypatch, tmp_path):
    known = build.VARIANTS["x86_64"]
    flags = {flag for _, required in known.values() for flag in required.split()}
    monkeypatch.setattr(build, "machine_variants", lambda: known)
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags - set(missing.split())))
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    assert build.packaged_variant() is None  # not in a wheel
    for name in known:
        (tmp_path / f"{name}.so").touch()
    found = build.packaged_variant()
    assert (found and found.stem) == expected
