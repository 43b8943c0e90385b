"""Where Redis is, as it is written and as it is meant."""

from __future__ import annotations

import pytest

from metquay_proxy.redis_address import RedisAddress, parse_redis_url


@pytest.mark.parametrize(
    ("text", "expected", "local"),
    [
        ("redis://localhost", RedisAddress("redis", "localhost", 6379), True),
        ("redis://[::1]:7000/3", RedisAddress("redis", "::1", 7000, database=3), True),
        ("REDIS://lab%40x@127.0.0.1/", RedisAddress("redis", "127.0.0.1", 6379, user="lab@x"), True),
        ("rediss://redis.Example:6380/0", RedisAddress("rediss", "redis.example", 6380), False),
        ("unix:///run/redis.sock", RedisAddress("unix", path="/run/redis.sock"), True),
    ],
)
def test_an_address(text: str, expected: RedisAddress, local: bool) -> None:  # noqa: FBT001 - a column
    """Scheme, host, port, database and user, or a path; what is left out has Redis's own default."""
    address = parse_redis_url(text)
    assert expected == address
    assert local == address.local
    assert address._replace(user=None) == parse_redis_url(str(address)), "it is shown as it could be written"


@pytest.mark.parametrize(
    "text",
    [
        *("localhost:6379", "http://localhost", "redis://", "redis://localhost/first", "redis://localhost:99999"),
        *("redis://localhost?password=open-sesame", "redis://localhost/0#x", "redis+tls://localhost"),
        *("unix:run/redis.sock", "unix://host/run/redis.sock", "redis://[::1"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    """The text tells which forms there are, and shows nothing of what was written."""
    with pytest.raises(ValueError, match="redis://host:6379/0") as caught:
        parse_redis_url(text)
    assert "open-sesame" not in str(caught.value)


def test_a_password_is_refused_and_not_shown() -> None:
    """An address is seen in process lists and logs."""
    with pytest.raises(ValueError, match="METQUAY_REDIS_PASSWORD_FILE") as caught:
        parse_redis_url("rediss://lab:open-sesame@redis.example")
    assert "open-sesame" not in str(caught.value)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra that most do not need."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "redis" else pytest.fail(name))
    with pytest.raises(ValueError, match=r"pip install '\.\[redis\]'"):
        parse_redis_url("redis://localhost")
