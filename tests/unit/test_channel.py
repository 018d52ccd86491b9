"""Streams beside Serve's calls: everything arrives, in order, in few writes, and only from whoever knows the key."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import uvloop

from stack import channel
from stack.channel import Receiver, Sender, Stream, Target
from stack.errors import Unavailable

SOON_S = 5.0


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver("127.0.0.1")
    yield receiver
    await receiver.stop()


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    sender = Sender()
    yield sender
    sender.stop()


async def text(stream: Stream) -> str:
    async with asyncio.timeout(SOON_S):
        return b"".join([item async for item in stream.items()]).decode()


async def test_streams_side_by_side_arrive_whole_and_apart(receiver: Receiver, sender: Sender) -> None:
    async def through(name: str) -> str:
        stream = await receiver.open()
        parts = [f"{name}{number} ".encode() for number in range(200)]
        for part in parts:
            await (await sender.open(stream.target)).send(part)
        stream.finish(sum(map(len, parts)))
        return await text(stream)

    names = [f"stream-{number}-" for number in range(20)]
    texts = await asyncio.gather(*map(through, names))
    assert texts == ["".join(f"{name}{number} " for number in range(200)) for name in names]


async def test_what_is_ready_together_arrives_together(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    for _ in range(100):
        await (await sender.open(stream.target)).send(b"x")
    stream.finish(100)
    items = [item async for item in stream.items()]
    assert b"".join(items) == b"x" * 100
    assert len(items) < 10


async def test_an_item_may_be_greater_than_what_a_read_takes(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    large = bytes(range(256)) * 10_000
    await (await sender.open(stream.target)).send(large)
    stream.finish(len(large))
    assert b"".join([item async for item in stream.items()]) == large


async def test_an_error_comes_after_what_had_arrived(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    await (await sender.open(stream.target)).send(b"before")
    items = stream.items()
    assert await anext(items) == b"before"
    stream.fail(ValueError("the replica died"))
    with pytest.raises(ValueError, match="the replica died"):
        await anext(items)


async def test_a_failure_ends_the_waiting_and_is_told_once(receiver: Receiver) -> None:
    stream = await receiver.open()
    told: list[str] = []
    stream.when_failed = lambda: told.append("failed")
    waiting = asyncio.create_task(anext(stream.items()))
    await asyncio.sleep(0)
    stream.fail(TimeoutError())
    stream.fail(ValueError())
    with pytest.raises(TimeoutError):
        await waiting
    assert told == ["failed"]


async def test_what_was_sent_before_the_end_comes_before_the_reason_for_it(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    stream.finish(6, ValueError("the engine died"))
    items = stream.items()
    outlet = await sender.open(stream.target)
    await outlet.send(b"before")
    assert await anext(items) == b"before"
    with pytest.raises(ValueError, match="the engine died"):
        await anext(items)


async def test_bytes_that_never_arrive_are_missed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LATE_S", 0.05)
    stream = await receiver.open()
    stream.finish(7)
    with pytest.raises(ConnectionError, match="7 bytes"):
        await anext(stream.items())


async def test_a_wrong_key_is_cut_off(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    reader, writer = await asyncio.open_connection(stream.target.host, stream.target.port)
    writer.write(b"k" * channel.KEY_BYTES + channel._HEADER.pack(1, 3) + b"bad")
    # Cut off by a reset or an end, whichever the system tells first.
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    await (await sender.open(stream.target)).send(b"good")
    stream.finish(4)
    assert await text(stream) == "good"


async def test_a_key_is_never_shown(receiver: Receiver) -> None:
    assert "key" not in repr((await receiver.open()).target)


async def test_a_closed_stream_drops_what_still_comes_and_harms_no_other(receiver: Receiver, sender: Sender) -> None:
    left, stays = await receiver.open(), await receiver.open()
    receiver.close(left)
    await (await sender.open(left.target)).send(b"late")
    await (await sender.open(stays.target)).send(b"here")
    stays.finish(4)
    assert await text(stays) == "here"
    assert left._arrived == 0


async def test_who_does_not_read_has_a_bound(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_WAITING_BYTES", 10)
    stream = await receiver.open()
    for _ in range(3):
        stream.put(b"12345")
    items = stream.items()
    assert await anext(items) == b"1234512345"
    with pytest.raises(Unavailable, match="10 bytes"):
        await anext(items)


async def test_a_stream_whose_connection_is_lost_does_not_go_on_by_another_one(
    receiver: Receiver, sender: Sender
) -> None:
    stream = await receiver.open()
    outlet = await sender.open(stream.target)
    await outlet.send(b"one")
    assert await anext(stream.items()) == b"one"
    (incoming,) = receiver._connections
    incoming.abort()

    async def send_until_refused() -> None:
        while True:
            await outlet.send(b"y")
            await asyncio.sleep(0)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send_until_refused(), SOON_S)
    other = await receiver.open()
    await (await sender.open(other.target)).send(b"new")
    other.finish(3)
    assert await text(other) == "new"


async def test_an_event_that_no_receiver_takes_is_not_sent(receiver: Receiver, sender: Sender) -> None:
    outlet = await sender.open((await receiver.open()).target)
    with pytest.raises(ValueError, match="at most"):
        await outlet.send(b"x" * (channel.MAX_WAITING_BYTES + 1))


async def test_a_stranger_is_cut_off_in_time(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "KEY_S", 0.05)
    stream = await receiver.open()
    reader, writer = await asyncio.open_connection(stream.target.host, stream.target.port)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), SOON_S) == b""
    writer.close()


async def test_only_so_many_strangers_are_let_in(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_STRANGERS", 2)
    target = (await receiver.open()).target
    opened = [await asyncio.open_connection(target.host, target.port) for _ in range(3)]
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(opened[2][0].read(), SOON_S) == b""
    assert len(receiver._connections) == 2
    for _, writer in opened:
        writer.close()


async def test_a_receiver_that_is_gone_is_an_error_and_another_one_is_reached(sender: Sender) -> None:
    first = Receiver("127.0.0.1")
    target = (await first.open()).target
    outlet = await sender.open(target)
    await first.stop()

    async def send_until_refused() -> None:
        while True:
            await outlet.send(b"y")
            await asyncio.sleep(0)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send_until_refused(), SOON_S)
    second = Receiver("127.0.0.1")
    stream = await second.open()
    await (await sender.open(stream.target)).send(b"there")
    stream.finish(5)
    assert await text(stream) == "there"
    await second.stop()


async def test_nobody_there_is_a_connection_error(sender: Sender, receiver: Receiver) -> None:
    target = (await receiver.open()).target
    await receiver.stop()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        await sender.open(target)


@pytest.fixture
def unreachable() -> Iterator[Target]:
    """A receiver that takes no connection and refuses none, as that of a node that is gone: its queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as filling:
        host, port = server.getsockname()
        for _ in range(3):
            client = filling.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((host, port))
        yield Target(host, port, b"k" * channel.KEY_BYTES, 1)


async def test_a_receiver_that_cannot_be_reached_holds_up_no_other_one(
    receiver: Receiver, sender: Sender, unreachable: Target
) -> None:
    waiting = asyncio.create_task(sender.open(unreachable))
    await asyncio.sleep(0)
    stream = await receiver.open()
    outlet = await asyncio.wait_for(sender.open(stream.target), SOON_S)
    await outlet.send(b"here")
    stream.finish(4)
    assert await text(stream) == "here"
    assert not waiting.done()
    waiting.cancel()


async def test_all_who_wait_for_a_connection_hear_together_that_it_cannot_be_made(
    sender: Sender, unreachable: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "CONNECT_S", 0.5)
    opening = asyncio.gather(*(sender.open(unreachable) for _ in range(20)), return_exceptions=True)
    found = await asyncio.wait_for(opening, SOON_S)
    assert [type(one) for one in found] == [ConnectionError] * 20
    assert sender._opening == {}


async def test_first_streams_at_once_share_one_connection_and_one_that_leaves_takes_it_from_nobody(
    receiver: Receiver, sender: Sender
) -> None:
    targets = [(await receiver.open()).target for _ in range(5)]
    leaves, *stay = [asyncio.create_task(sender.open(target)) for target in targets]
    await asyncio.sleep(0)
    leaves.cancel()
    outlets = await asyncio.wait_for(asyncio.gather(*stay), SOON_S)
    assert len({id(outlet._connection) for outlet in outlets}) == 1
    assert len(sender._connections) == 1


def test_it_works_on_the_event_loop_of_serves_replicas() -> None:
    async def through() -> str:
        receiver, sender = Receiver("127.0.0.1"), Sender()
        stream = await receiver.open()
        await (await sender.open(stream.target)).send(b"all of it")
        stream.finish(9)
        there = await text(stream)
        sender.stop()
        await receiver.stop()
        return there

    assert uvloop.run(through()) == "all of it"


def test_a_target_can_be_sent_to_a_replica() -> None:
    from ray import cloudpickle

    target = Target("127.0.0.1", 1, b"secret", 3)
    assert cloudpickle.loads(cloudpickle.dumps(target)) == target
