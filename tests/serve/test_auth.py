"""API keys: which headers are accepted, and that keys are not disclosed."""

import hmac

import pytest

from owl2.errors import ErrorCode
from owl2.serve.auth import ApiKeys
from owl2.serve.errors import ApiError
from tests.errors import raises_input_error

FIRST, SECOND = "first-key-0123", "second-key-4567"


@pytest.fixture
def keys():
    return ApiKeys([FIRST, SECOND])


@pytest.mark.parametrize(
    "header", [f"Bearer {FIRST}", f"Bearer {SECOND}", f"bearer {FIRST}", f" BEARER   {FIRST} "]
)
def test_each_key_is_accepted(keys, header):
    key = SECOND if SECOND in header else FIRST
    assert keys.check(header) == keys.check(f"Bearer {key}")  # one client


def test_each_key_is_a_client(keys):
    assert keys.check(f"Bearer {FIRST}") != keys.check(f"Bearer {SECOND}")


@pytest.mark.parametrize(
    "header",
    [
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
def test_other_headers_are_rejected(keys, header):
    with pytest.raises(ApiError) as caught:
        keys.check(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert FIRST not in caught.value.message


def test_all_digests_are_compared_in_constant_time(keys, monkeypatch):
    compared = []

    def compare(one, other, real=hmac.compare_digest):
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys.check(f"Bearer {FIRST}")
    assert len(compared) == 2  # although the first one matches
    assert {len(side) for pair in compared for side in pair} == {32}  # for keys of any length


def test_keys_are_not_stored_as_plain_text(keys):
    assert FIRST not in repr(vars(keys)) + repr(keys) + str(keys)


def test_keys_from_environment_and_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OWL2_TEST_KEYS", f" {FIRST}, {SECOND},")
    file = tmp_path / "keys"
    file.write_text(f"# comment\n\n{FIRST}\n  {SECOND}  \n")
    for keys in (ApiKeys.read("OWL2_TEST_KEYS", None), ApiKeys.read(None, file)):
        assert keys.is_valid(FIRST) and keys.is_valid(SECOND)
        assert not keys.is_valid("# comment")
    assert ApiKeys.read(None, None) is None


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("", ErrorCode.MISSING_VALUE),
        ("short", ErrorCode.INVALID_VALUE),
        ("with a space in it", ErrorCode.INVALID_VALUE),
        ("schlüssel-der-passt", ErrorCode.INVALID_VALUE),
        ("a\tb" * 9, ErrorCode.INVALID_VALUE),
    ],
)
def test_unsuitable_key_is_rejected_and_not_shown(tmp_path, key, code):
    file = tmp_path / "keys"
    file.write_text(f"{FIRST}\n{key}\n" if key else "# none\n")
    with raises_input_error(code, file) as caught:
        ApiKeys.read(None, file)
    assert FIRST not in str(caught.value)
    assert not key or key not in str(caught.value)


def test_missing_and_unreadable_keys(tmp_path, monkeypatch):
    monkeypatch.delenv("OWL2_TEST_KEYS", raising=False)
    with raises_input_error(ErrorCode.MISSING_VALUE, "OWL2_TEST_KEYS"):
        ApiKeys.read("OWL2_TEST_KEYS", None)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    for name in ("none", "bytes"):
        with raises_input_error(ErrorCode.UNREADABLE_FILE, tmp_path / name):
            ApiKeys.read(None, tmp_path / name)
