"""API keys: who gets in, and that nothing tells them."""

import hmac

import pytest

from owl2.errors import InputError
from owl2.serve.auth import ApiKeys
from owl2.serve.errors import ApiError

FIRST, SECOND = "first-key-0123", "second-key-4567"


@pytest.fixture
def keys():
    return ApiKeys([FIRST, SECOND])


@pytest.mark.parametrize(
    "header", [f"Bearer {FIRST}", f"Bearer {SECOND}", f"bearer {FIRST}", f" BEARER   {FIRST} "]
)
def test_every_key_opens(keys, header):
    keys.check(header.encode())


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        FIRST,
        f"Basic {FIRST}",
        f"Bearer {FIRST}x",
        f"Bearer {FIRST[:-1]}",
        f"Bearer {FIRST} {SECOND}",
        f"Bearer {FIRST.upper()}",
        "Bearer \xff\xfe",
    ],
)
def test_everything_else_is_refused(keys, header):
    with pytest.raises(ApiError) as caught:
        keys.check(None if header is None else header.encode("latin-1"))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert FIRST not in caught.value.message


def test_all_keys_are_compared_and_in_constant_time(keys, monkeypatch):
    compared = []

    def compare(one, other, real=hmac.compare_digest):
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys.check(f"Bearer {FIRST}".encode())
    assert len(compared) == 2  # though the first one fits
    assert {len(side) for pair in compared for side in pair} == {32}  # whatever a key's length


def test_a_key_is_kept_nowhere(keys):
    assert FIRST not in repr(vars(keys)) + repr(keys) + str(keys)


def test_keys_of_the_environment_and_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OWL2_TEST_KEYS", f" {FIRST}, {SECOND},")
    file = tmp_path / "keys"
    file.write_text(f"# who may\n\n{FIRST}\n  {SECOND}  \n")
    for keys in (ApiKeys.from_env("OWL2_TEST_KEYS"), ApiKeys.from_file(file)):
        keys.check(f"Bearer {FIRST}".encode())
        keys.check(f"Bearer {SECOND}".encode())
        with pytest.raises(ApiError):
            keys.check(b"Bearer # who may")


@pytest.mark.parametrize(
    "bad", ["", "short", "with a space in it", "schlüssel-der-passt", "a\tb" * 9]
)
def test_keys_that_protect_nothing_are_refused_and_not_shown(tmp_path, bad):
    file = tmp_path / "keys"
    file.write_text(f"{FIRST}\n{bad}\n" if bad else "# none\n")
    with pytest.raises(InputError) as caught:
        ApiKeys.from_file(file)
    assert str(file) in str(caught.value)
    assert FIRST not in str(caught.value)
    assert not bad or bad not in str(caught.value)


def test_keys_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("OWL2_TEST_KEYS", raising=False)
    with pytest.raises(InputError, match="OWL2_TEST_KEYS"):
        ApiKeys.from_env("OWL2_TEST_KEYS")
    with pytest.raises(InputError, match="cannot be read"):
        ApiKeys.from_file(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        ApiKeys.from_file(tmp_path / "bytes")
