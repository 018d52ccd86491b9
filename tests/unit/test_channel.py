"""Streams beside Serve's calls: everything arrives, in order, in few writes, and only from whoever knows the key."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest
import uvloop

from stack import channel
from stack.channel import Receiver, Sender, Stream, Target

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


def deadline(seconds: float = SOON_S) -> float:
    return asyncio.get_running_loop().time() + seconds


async def text(stream: Stream) -> str:
    return b"".join([item async for item in stream.items(deadline())]).decode()


async def test_streams_side_by_side_arrive_whole_and_apart(receiver: Receiver, sender: Sender) -> None:
    async def through(name: str) -> str:
        stream = await receiver.open()
        parts = [f"{name}{number} ".encode() for number in range(200)]
        for part in parts:
            await sender.send(stream.target, part)
        stream.finish(sum(map(len, parts)))
        return await text(stream)

    names = [f"stream-{number}-" for number in range(20)]
    texts = await asyncio.gather(*map(through, names))
    assert texts == ["".join(f"{name}{number} " for number in range(200)) for name in names]


async def test_what_is_ready_together_arrives_together(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    for _ in range(100):
        await sender.send(stream.target, b"x")
    stream.finish(100)
    items = [item async for item in stream.items(deadline())]
    assert b"".join(items) == b"x" * 100
    assert len(items) < 10


async def test_an_item_may_be_greater_than_what_a_read_takes(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    large = bytes(range(256)) * 10_000
    await sender.send(stream.target, large)
    stream.finish(len(large))
    assert b"".join([item async for item in stream.items(deadline())]) == large


async def test_an_error_comes_after_what_had_arrived(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    await sender.send(stream.target, b"before")
    items = stream.items(deadline())
    assert await anext(items) == b"before"
    stream.fail(ValueError("the replica died"))
    with pytest.raises(ValueError, match="the replica died"):
        await anext(items)


async def test_waiting_ends_at_the_deadline(receiver: Receiver) -> None:
    stream = await receiver.open()
    with pytest.raises(TimeoutError):
        await anext(stream.items(deadline(0.05)))


async def test_bytes_that_never_arrive_are_missed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LATE_S", 0.05)
    stream = await receiver.open()
    stream.finish(7)
    with pytest.raises(ConnectionError, match="7 bytes"):
        await anext(stream.items(deadline()))


async def test_a_wrong_key_is_cut_off(receiver: Receiver, sender: Sender) -> None:
    stream = await receiver.open()
    reader, writer = await asyncio.open_connection(stream.target.host, stream.target.port)
    writer.write(b"k" * channel.KEY_BYTES + channel._HEADER.pack(1, 3) + b"bad")
    # Cut off by a reset or an end, whichever the system tells first.
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    await sender.send(stream.target, b"good")
    stream.finish(4)
    assert await text(stream) == "good"


async def test_a_key_is_never_shown(receiver: Receiver) -> None:
    assert "key" not in repr((await receiver.open()).target)


async def test_a_closed_stream_drops_what_still_comes_and_harms_no_other(receiver: Receiver, sender: Sender) -> None:
    left, stays = await receiver.open(), await receiver.open()
    receiver.close(left)
    await sender.send(left.target, b"late")
    await sender.send(stays.target, b"here")
    stays.finish(4)
    assert await text(stays) == "here"
    assert left._arrived == 0


async def test_who_does_not_read_has_a_bound(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_WAITING_BYTES", 10)
    stream = await receiver.open()
    for _ in range(3):
        stream.put(b"12345")
    items = stream.items(deadline())
    assert await anext(items) == b"1234512345"
    with pytest.raises(BufferError, match="10 bytes"):
        await anext(items)


async def test_a_receiver_that_is_gone_is_an_error_and_another_one_is_reached(sender: Sender) -> None:
    first = Receiver("127.0.0.1")
    target = (await first.open()).target
    await sender.send(target, b"x")
    await first.stop()

    async def send_until_refused() -> None:
        while True:
            await sender.send(target, b"y")
            await asyncio.sleep(0)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send_until_refused(), SOON_S)
    second = Receiver("127.0.0.1")
    stream = await second.open()
    await sender.send(stream.target, b"there")
    stream.finish(5)
    assert await text(stream) == "there"
    await second.stop()


async def test_nobody_there_is_a_connection_error(sender: Sender, receiver: Receiver) -> None:
    target = (await receiver.open()).target
    await receiver.stop()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        await sender.send(dataclasses.replace(target, host="127.0.0.1"), b"x")


def test_it_works_on_the_event_loop_of_serves_replicas() -> None:
    async def through() -> str:
        receiver, sender = Receiver("127.0.0.1"), Sender()
        stream = await receiver.open()
        await sender.send(stream.target, b"all of it")
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
