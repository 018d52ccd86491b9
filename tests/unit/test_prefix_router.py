"""Requests that begin alike meet in one replica, unless it is busy or gone."""

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
    from ray.serve.request_router import PendingRequest, ReplicaID

    from serve_apps.prefix_router import BLOCK, MAX_BLOCKS, PrefixRouter, beginnings, prompt_of

DEPLOYMENT = DeploymentID(name="LLM:small", app_name="small")
SYSTEM = {"role": "system", "content": "You are helpful. " * 100}


@dataclass
class Replica:
    """What a router knows of a replica."""

    replica_id: ReplicaID
    queue_len: int = 0
    multiplexed_model_ids: set[str] = field(default_factory=set)
    node_id: str = "node"
    availability_zone: str | None = None
    max_ongoing_requests: int = 100

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue_len


def replica(name: str, **others: Any) -> Replica:
    return Replica(ReplicaID(name, DEPLOYMENT), **others)


@pytest.fixture
async def router() -> PrefixRouter:
    """A router of three replicas."""
    router = PrefixRouter(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
    router.initialize_state(slack=4)
    router.update_replicas([replica("a"), replica("b"), replica("c")])
    return router


def request(*messages: Any, adapter: str = "", **body: Any) -> PendingRequest:
    args = ["chat", ({"messages": list(messages)} if messages else {}) | body, object()]
    metadata = RequestMetadata(request_id="1", internal_request_id="1", multiplexed_model_id=adapter)
    return PendingRequest(args=args, kwargs={}, metadata=metadata)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def chosen(router: PrefixRouter, asked: PendingRequest) -> list[list[str]]:
    ranks = await router.choose_replicas(list(router.curr_replicas.values()), asked)
    return [[one.replica_id.unique_id for one in rank] for rank in ranks]


def routed(router: PrefixRouter, asked: PendingRequest, name: str) -> None:
    router.on_request_routed(asked, ReplicaID(name, DEPLOYMENT), None)


async def test_a_new_prompt_goes_to_one_of_two_at_random(router: PrefixRouter) -> None:
    seen: Counter[str] = Counter()
    for _ in range(200):
        (rank,) = await chosen(router, request(SYSTEM, user("Where?")))
        assert len(set(rank)) == 2
        seen.update(rank)
    assert set(seen) == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["a", "b", "c"])
async def test_the_next_request_with_the_same_beginning_prefers_the_same_replica(
    router: PrefixRouter, name: str
) -> None:
    routed(router, request(SYSTEM, user("Where?")), name)
    ranks = await chosen(router, request(SYSTEM, user("When?")))
    assert ranks[0] == [name]
    assert len(ranks[1]) == 2, "the others are asked if it is full"


async def test_the_longest_beginning_counts(router: PrefixRouter) -> None:
    conversation = [SYSTEM, user("Where? " * 200)]
    routed(router, request(*conversation), "a")
    routed(router, request(SYSTEM, user("Other. " * 200)), "b")
    assert (await chosen(router, request(*conversation, user("And then?"))))[0] == ["a"]
    assert (await chosen(router, request(SYSTEM, user("Other. " * 200), user("Why?"))))[0] == ["b"]


async def test_texts_of_completions_count_too(router: PrefixRouter) -> None:
    routed(router, request(prompt="Once upon a time. " * 50), "c")
    assert (await chosen(router, request(prompt="Once upon a time. " * 50 + "The end.")))[0] == ["c"]
    assert (await chosen(router, request(prompt=list(range(500)))))[0] != ["c"]


async def test_a_short_prompt_is_compared_as_a_whole(router: PrefixRouter) -> None:
    routed(router, request(prompt="Hello"), "b")
    assert (await chosen(router, request(prompt="Hello")))[0] == ["b"]
    assert len(await chosen(router, request(prompt="Goodbye"))) == 1


async def test_what_has_no_prompt_goes_anywhere(router: PrefixRouter) -> None:
    routed(router, request(), "a")
    assert len(await chosen(router, request())) == 1


async def test_another_adapter_shares_nothing(router: PrefixRouter) -> None:
    loaded = {"small:tune-1", "small:tune-2"}
    router.update_replicas([replica(name, multiplexed_model_ids=loaded) for name in "abc"])
    routed(router, request(SYSTEM, adapter="small:tune-1"), "a")
    assert (await chosen(router, request(SYSTEM, adapter="small:tune-1")))[0] == ["a"]
    assert len(await chosen(router, request(SYSTEM, adapter="small:tune-2"))) == 1


async def test_an_adapter_stays_where_it_is_loaded(router: PrefixRouter) -> None:
    router.update_replicas([replica("a"), replica("b", multiplexed_model_ids={"small:tune-1"}), replica("c")])
    routed(router, request(SYSTEM, adapter="small:tune-1"), "a")
    assert await chosen(router, request(SYSTEM, adapter="small:tune-1")) == [["b"]]


async def test_a_replica_that_is_much_busier_than_others_is_not_preferred(router: PrefixRouter) -> None:
    asked = request(SYSTEM)
    routed(router, asked, "a")
    home = ReplicaID("a", DEPLOYMENT)
    router.on_new_queue_len_info(home, 4)
    assert (await chosen(router, asked))[0] == ["a"]
    router.on_new_queue_len_info(home, 5)
    assert len(await chosen(router, asked)) == 1
    router.on_request_completed(home, "1")
    assert (await chosen(router, asked))[0] == ["a"]
    for name in "bc":
        router.on_new_queue_len_info(ReplicaID(name, DEPLOYMENT), 30)
    router.on_new_queue_len_info(home, 34)
    assert (await chosen(router, asked))[0] == ["a"], "all are busy"


async def test_a_replica_that_is_gone_is_not_preferred(router: PrefixRouter) -> None:
    routed(router, request(SYSTEM), "a")
    router.update_replicas([replica("b"), replica("c")])
    assert sorted((await chosen(router, request(SYSTEM)))[0]) == ["b", "c"]
    router.update_replicas([])
    assert await chosen(router, request(SYSTEM)) == []


async def test_one_replica_gets_everything(router: PrefixRouter) -> None:
    router.update_replicas([replica("a")])
    assert await chosen(router, request(SYSTEM)) == [["a"]]


async def test_only_so_much_is_remembered(router: PrefixRouter) -> None:
    router.initialize_state(slack=4, remembered=2)
    for text in ("one", "two", "three"):
        routed(router, request(prompt=text), "a")
    assert len(await chosen(router, request(prompt="one"))) == 1
    assert (await chosen(router, request(prompt="three")))[0] == ["a"]


async def test_beginnings_of_prompts_that_begin_alike_are_alike() -> None:
    one = list(beginnings(request(prompt="a" * BLOCK * 3 + "b" * BLOCK)))
    other = list(beginnings(request(prompt="a" * BLOCK * 3 + "c" * BLOCK)))
    assert (len(one), len(other)) == (4, 4)
    assert one[:3] == other[:3]
    assert one[3] != other[3]
    assert len(set(one)) == 4


async def test_of_a_long_prompt_only_the_beginning_is_looked_at() -> None:
    assert len(list(beginnings(request(*[user("x" * 1_000)] * 4_000)))) == MAX_BLOCKS
    assert len(prompt_of(["chat", {"messages": [user("x" * 1_000)] * 4_000}])) < 2 * BLOCK * MAX_BLOCKS
