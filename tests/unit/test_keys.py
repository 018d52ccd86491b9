"""API keys: what is made, what is kept of it, who holds one, and which addresses need them."""

import re
import threading
from typing import Any

import pytest
from sqlalchemy import event, text

from stack import keys
from stack.context import SCOPES, Principal
from stack.errors import BadInput, NotFound, Unauthorized
from stack.keys import Keyring
from stack.store import Store


class Clock:
    """The time as a keyring sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1_000.0
        monkeypatch.setattr(keys, "monotonic", lambda: self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def asked(store: Store) -> list[str]:
    """The statements that the database is asked from here on."""
    statements: list[str] = []
    event.listen(store.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    return statements


def everything_in(store: Store) -> str:
    with store.engine.connect() as connection:
        return repr(connection.execute(text("SELECT * FROM api_keys")).all())


# Making, listing, revoking


def test_a_key_can_be_recognised_and_is_not_kept(store: Store) -> None:
    row, key = keys.create(store, "acme", "ci", ["data", "inference"])
    assert re.fullmatch(rf"lsr_{row.id}_[A-Za-z0-9_-]{{43}}", key)
    assert (row.tenant, row.name, row.scopes, row.revoked_at) == ("acme", "ci", ["inference", "data"], None)
    secret = key.rsplit(row.id, 1)[1]
    assert secret not in everything_in(store)
    assert store.keys.list() == [row]


def test_no_two_keys_are_the_same(store: Store) -> None:
    made = {keys.create(store, "acme", "ci", ["data"])[1] for _ in range(50)}
    assert len(made) == 50
    assert len({key.split("_")[1] for key in made}) == 50


def test_keys_are_listed_by_tenant(store: Store) -> None:
    first, _ = keys.create(store, "acme", "one", ["data"])
    second, _ = keys.create(store, "other", "two", ["data"])
    assert {row.id for row in store.keys.list()} == {first.id, second.id}
    assert store.keys.list("acme") == [first]
    assert store.keys.list("nobody") == []


@pytest.mark.parametrize("tenant", ["a", "default", "0", "a-b_c9", "x" * 63])
def test_these_may_be_tenants(tenant: str) -> None:
    keys.check_tenant(tenant)


@pytest.mark.parametrize(
    "tenant", ["", "a.b", "a/b", "..", "/a", "a\\b", "-a", "_a", "A", "ä", "a b", "a\0", "a\n", "x" * 64, "x" * 10_000]
)
def test_these_may_not(tenant: str) -> None:
    with pytest.raises(BadInput, match="the tenant must be 1 to 63 of a-z") as caught:
        keys.check_tenant(tenant)
    assert caught.value.param == "tenant"
    assert len(caught.value.message) < 500


def test_a_wrong_tenant_gets_no_key(store: Store) -> None:
    with pytest.raises(BadInput, match="the tenant must be"):
        keys.create(store, "a.b", "n", ["data"])
    assert store.keys.list() == []


def test_a_name_is_short_and_printable(store: Store) -> None:
    for name in ("", "x" * 201, "a\nb", "\x1b[31m", "a\0"):
        with pytest.raises(BadInput, match="the name must have 1 to 200 printable characters"):
            keys.create(store, "acme", name, ["data"])
    assert store.keys.list() == []


def test_scopes_are_those_there_are(store: Store) -> None:
    wrong: list[tuple[list[str], str]] = [([], "at least one"), (["data", "root"], "'root'"), (["Data"], "'Data'")]
    for scopes, word in wrong:
        with pytest.raises(BadInput, match=f"{word}.*allowed: {', '.join(SCOPES)}"):
            keys.create(store, "acme", "n", scopes)
    assert store.keys.list() == []


def test_revoking_is_for_good_and_can_be_done_again(store: Store) -> None:
    row, key = keys.create(store, "acme", "n", ["data"])
    revoked = keys.revoke(store, row.id)
    assert revoked.revoked_at is not None
    assert keys.revoke(store, row.id) == revoked
    with pytest.raises(Unauthorized):
        Keyring(store).find(key)


def test_what_is_no_id_cannot_be_revoked(store: Store) -> None:
    row, _ = keys.create(store, "acme", "n", ["data"])
    for wrong in ("", "0123456789abcdef", "' OR 1=1 --", "x" * 5_000, "\0"):
        with pytest.raises(NotFound) as caught:
            keys.revoke(store, wrong)
        assert len(caught.value.message) < 200
    assert store.keys.list() == [row]


def test_a_whole_key_in_the_place_of_its_id_is_not_shown(store: Store) -> None:
    _, key = keys.create(store, "acme", "n", ["data"])
    with pytest.raises(NotFound) as caught:
        keys.revoke(store, key)
    assert key[-43:] not in caught.value.message


# The keyring


def test_a_key_is_its_tenants(store: Store) -> None:
    _, key = keys.create(store, "acme", "n", ["data", "training"])
    assert Keyring(store).find(key) == Principal("acme", frozenset(("data", "training")))


def test_a_known_key_asks_no_database_until_it_is_old(store: Store, clock: Clock, asked: list[str]) -> None:
    _, key = keys.create(store, "acme", "n", ["data"])
    keyring = Keyring(store, ttl=2)
    assert keyring.known(key) is None
    principal = keyring.find(key)
    asked.clear()
    clock.seconds += 1.9
    assert keyring.known(key) == principal
    assert asked == []
    clock.seconds += 0.2
    assert keyring.known(key) is None


def test_a_revoked_key_is_known_no_longer_than_that(store: Store, clock: Clock) -> None:
    row, key = keys.create(store, "acme", "n", ["data"])
    keyring = Keyring(store, ttl=2)
    keyring.find(key)
    keys.revoke(store, row.id)
    clock.seconds += 2
    assert keyring.known(key) is None
    with pytest.raises(Unauthorized):
        keyring.find(key)
    assert keyring.known(key) is None


def test_wrong_keys_do_not_drive_out_right_ones(store: Store) -> None:
    _, key = keys.create(store, "acme", "n", ["data"])
    keyring = Keyring(store, size=2)
    keyring.find(key)
    for number in range(20):
        with pytest.raises(Unauthorized):
            keyring.find(f"lsr_{number:016x}_{'A' * 43}")
    assert keyring.known(key) is not None


def test_a_keyring_keeps_no_more_keys_than_its_size(store: Store) -> None:
    made = [keys.create(store, "acme", "n", ["data"])[1] for _ in range(5)]
    keyring = Keyring(store, size=3)
    for key in made:
        keyring.find(key)
    assert [keyring.known(key) is not None for key in made] == [False, False, True, True, True]


def test_what_can_be_no_key_asks_no_database(store: Store, asked: list[str]) -> None:
    for key in ("", "none", "lsr_", "lsr_0123456789abcdef_short", "sk-" + "a" * 60, "ä" * 64, "a" * 10**7):
        with pytest.raises(Unauthorized) as caught:
            Keyring(store).known(key)
        assert len(caught.value.message) < 100
    assert asked == []


def test_an_almost_right_key_is_not_known_and_not_shown(store: Store) -> None:
    _, key = keys.create(store, "acme", "n", ["data"])
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    keyring = Keyring(store)
    assert keyring.known(wrong) is None
    with pytest.raises(Unauthorized) as caught:
        keyring.find(wrong)
    assert wrong[-43:] not in str(caught.value)


def test_many_threads_find_their_own_keys(store: Store) -> None:
    made = {f"t{number}": keys.create(store, f"t{number}", "n", ["data"])[1] for number in range(8)}
    keyring = Keyring(store, size=4)
    found: dict[str, Any] = {}

    def find(tenant: str, key: str) -> None:
        found[tenant] = {(keyring.known(key) or keyring.find(key)).tenant for _ in range(20)}

    threads = [threading.Thread(target=find, args=one) for one in made.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {tenant: {tenant} for tenant in made}


def test_without_any_key_it_is_open_and_asked_again(store: Store, clock: Clock) -> None:
    keyring = Keyring(store, ttl=2)
    assert keyring.is_open() is None
    assert keyring.ask_whether_open()
    assert keyring.is_open() is True
    keys.create(store, "acme", "n", ["data"])
    clock.seconds += 2
    assert keyring.is_open() is None
    assert not keyring.ask_whether_open()
    assert keyring.is_open() is False


def test_once_a_key_was_made_it_is_never_open_again(store: Store) -> None:
    row, _ = keys.create(store, "acme", "n", ["data"])
    keys.revoke(store, row.id)
    assert not Keyring(store).ask_whether_open()


# Addresses

OWN = ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "0:0:0:0:0:0:0:1", "localhost", "LocalHost", "::ffff:127.0.0.1"]
OTHERS = ["0.0.0.0", "::", "[::]", "", "192.168.1.5", "10.0.0.1", "fe80::1", "::ffff:10.0.0.1", "example.org"]
# What some resolvers take for loopback, others for anything.
DOUBTFUL = ["0", "127.1", "2130706433", "127.0.0.1.nip.io", "localhost.example.org"]


@pytest.mark.parametrize(
    ("host", "own"), [*((host, True) for host in OWN), *((host, False) for host in [*OTHERS, *DOUBTFUL])]
)
def test_which_addresses_are_this_machines_alone(host: str, own: bool) -> None:
    assert keys.is_loopback(host) == own


def test_this_machine_alone_may_be_listened_to_without_keys(store: Store) -> None:
    for host in OWN:
        keys.require_keys(store, host)
    for host in [*OTHERS, *DOUBTFUL]:
        with pytest.raises(Unauthorized, match="python -m stack keys create") as caught:
            keys.require_keys(store, host)
        assert "\n" not in caught.value.message
    with pytest.raises(Unauthorized, match="python -m stack keys create") as caught:
        keys.require_keys(store, None)
    assert "http_options" not in caught.value.message, "what it is set to is not known"
    keys.create(store, "acme", "n", ["data"])
    for one in [*OTHERS, None]:
        keys.require_keys(store, one)
