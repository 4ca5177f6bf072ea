"""URLs of servers, and credentials of every kind."""

import time

import pytest

from relay.probe.client import Credential
from relay.probe.target import (
    Target,
    TargetError,
    expired_since,
    from_firezone_secret,
    from_rest_secret,
    parse_uri,
    read_ice_servers,
)
from relay.stun.const import PasswordAlgorithm
from relay.stun.integrity import long_term_key
from relay.turn.users import Users


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("turn:turn.example.org", Target("turn", "turn.example.org", 3478, "udp")),
        ("turn:192.0.2.1:3479", Target("turn", "192.0.2.1", 3479, "udp")),
        ("turn:192.0.2.1:3478?transport=tcp", Target("turn", "192.0.2.1", 3478, "tcp")),
        ("TURN:a.example?transport=UDP", Target("turn", "a.example", 3478, "udp")),
        ("turn:[2001:db8::1]:3478", Target("turn", "2001:db8::1", 3478, "udp")),
        ("turns:turn.example.org", Target("turns", "turn.example.org", 5349, "tls")),
        ("turns:a.example:443?transport=tcp", Target("turns", "a.example", 443, "tls")),
        ("stun:a.example", Target("stun", "a.example", 3478, "udp")),
        ("stuns:a.example", Target("stuns", "a.example", 5349, "tls")),
        ("turn://a.example:1", Target("turn", "a.example", 1, "udp")),
    ],
)
def test_a_url(text: str, target: Target) -> None:
    assert parse_uri(text) == target
    assert parse_uri(str(target)) == target


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("turn.example.org", "is no URL"),
        ("http://a.example", "none of stun"),
        ("turn:a.example:0", "is no port"),
        ("turn:a.example:65536", "is no port"),
        ("turn:a.example?transport=sctp", "neither udp nor tcp"),
        ("turns:a.example?transport=udp", "DTLS"),
        ("turn:", "is no URL"),
        ("turn:2001:db8::1", "is no URL"),
        ("turn:a.example/path", "is no URL"),
        ("turn:user@a.example", "is no URL"),
    ],
)
def test_what_is_no_url(text: str, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        parse_uri(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"urls": ["turn:a", "turn:b"], "username": "u", "credential": "c", "expires": 1}',
        """[{"urls": "turn:a", "username": "u", "credential": "c"},
            {"urls": "turn:b", "username": "u", "credential": "c"}]""",
        '{"iceServers": [{"urls": ["turn:a", "turn:b"], "username": "u", "credential": "c"}]}',
    ],
    ids=["as --mint prints it", "a list", "a configuration"],
)
def test_ice_servers(text: str) -> None:
    credential = Credential("u", "c")
    assert read_ice_servers(text) == [("turn:a", credential), ("turn:b", credential)]


def test_an_ice_server_without_a_credential() -> None:
    assert read_ice_servers('{"urls": "stun:a"}') == [("stun:a", None)]


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '{"urls": [1]}', '{"iceServers": []}'])
def test_what_is_no_ice_server(text: str) -> None:
    with pytest.raises(TargetError):
        read_ice_servers(text)


def test_credentials_of_secrets_are_good_for_the_relay() -> None:
    for users, credential in (
        (Users(rest_secrets=("first",)), from_rest_secret("\nfirst\nsecond\n", "probe")),
        (Users(rest_secrets=("first",)), from_rest_secret("# of May\nfirst\n", "probe")),
        (Users(secret="word"), from_firezone_secret("word\n", "salt")),
    ):
        [key] = [*users.keys(credential.username, PasswordAlgorithm.MD5)]
        assert key == long_term_key(credential.username, users.realm, credential.password)
        assert not users.has_expired(credential.username, time.time())
        assert expired_since(credential) is None


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_file_without_a_secret(text: str) -> None:
    with pytest.raises(TargetError, match="no secret"):
        from_rest_secret(text, "probe")
    with pytest.raises(TargetError, match="no secret"):
        from_firezone_secret(text, "salt")


def test_when_a_credential_has_expired() -> None:
    late = expired_since(Credential(f"{int(time.time()) - 100}:alice", ""))
    assert late is not None
    assert late >= 99
    assert expired_since(Credential("alice", "")) is None
    assert expired_since(Credential("42:alice", "")) is None
