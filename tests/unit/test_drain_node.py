"""A node is left when nothing serves on it any more."""

from scripts.drain_node import wait_until_empty

REPLICA, PROXY = "SERVE_REPLICA::gateway#Gateway#abc", "SERVE_PROXY_ACTOR-def"


def test_it_is_left_as_soon_as_nothing_serves_on_it() -> None:
    seen = [[REPLICA, PROXY], [PROXY], []]
    slept: list[float] = []
    assert wait_until_empty(lambda: seen.pop(0), 60, slept.append) == []
    assert (seen, len(slept)) == ([], 2)


def test_it_is_left_when_its_time_is_over_and_it_is_said_what_was_on_it() -> None:
    slept: list[float] = []
    assert wait_until_empty(lambda: [REPLICA], 10, slept.append) == [REPLICA]
    assert sum(slept) == 10


def test_an_empty_node_is_left_at_once() -> None:
    slept: list[float] = []
    assert wait_until_empty(list, 600, slept.append) == []
    assert slept == []
