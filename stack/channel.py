"""The way of a streamed answer from a model's replica to whoever asked for it.

Ray Serve carries a request and its end, with all that belongs to it: routing, queues, autoscaling, cancelling. What is
streamed comes beside it, over one TCP connection between the two processes, because each item of a Serve stream is an
object of Ray, which at a token each costs more than all the rest of the way. Here what is ready together, of all
streams, leaves in one write and arrives in one read.

The asker listens (Receiver) and names itself in the request (Target); the replica connects (Sender). A connection
begins with the receiver's key, a secret that only Serve has carried; frames follow: the number of the stream, the
number of bytes, the bytes.
"""

import asyncio
import secrets
import struct
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import cast

from stack.errors import Unavailable

KEY_BYTES = 32
# What one stream may have waiting for a client that reads slowly, and a connection for a receiver that does.
MAX_WAITING_BYTES = 8 * 2**20
CONNECT_S = 10.0
# What a connection has to say its key, and how many may be without one: others than replicas may reach the port.
KEY_S = 5.0
MAX_STRANGERS = 64
# How long what a replica has sent may still be on its way after the replica has reported its end.
LATE_S = 10.0
_HEADER = struct.Struct("!QI")
Address = tuple[str, int, bytes]  # of a receiver: host, port, key


@dataclass(frozen=True)
class Target:
    """Where a stream goes: the receiver, its key, and the number of the stream there."""

    host: str
    port: int
    key: bytes = field(repr=False)
    stream: int


class Stream:
    """What arrives of one stream. It ends when `finish` has told how many bytes were sent and all of them are there.

    `when_failed` is called once, when nothing more is to be waited for.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.when_failed: Callable[[], object] | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._arrived = 0
        self._sent: int | None = None
        self._broken_off_by: BaseException | None = None
        self._failed_by: BaseException | None = None
        self._changed = asyncio.Event()

    def finish(self, sent: int, broken_off_by: BaseException | None = None) -> None:
        """The replica has sent so many bytes, all in all. Then, `broken_off_by` is raised where there is one."""
        self._sent = sent
        self._broken_off_by = broken_off_by
        self._changed.set()

    def fail(self, error: BaseException) -> None:
        """Nothing more is waited for; the iterator raises this after what has arrived."""
        if self._failed_by is None:
            self._failed_by = error
            self._changed.set()
            if self.when_failed is not None:
                self.when_failed()

    def put(self, data: bytes) -> None:
        self._arrived += len(data)
        if self._failed_by is not None:
            return
        self._waiting_bytes += len(data)
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self.fail(Unavailable(f"{MAX_WAITING_BYTES} bytes wait for a client that does not read them"))
            return
        self._waiting.append(data)
        self._changed.set()

    async def items(self) -> AsyncGenerator[bytes]:
        """What has arrived, together, as soon as something has."""
        while True:
            if self._waiting:
                item = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
                self._waiting.clear()
                self._waiting_bytes = 0
                yield item
                continue
            if self._failed_by is not None:
                raise self._failed_by
            if self._sent is not None and self._arrived >= self._sent:
                if self._broken_off_by is not None:
                    raise self._broken_off_by
                return
            self._changed.clear()
            await self._wait()

    async def _wait(self) -> None:
        if self._sent is None:
            await self._changed.wait()
            return
        try:
            async with asyncio.timeout(LATE_S):
                await self._changed.wait()
        except TimeoutError as error:
            lost = self._sent - self._arrived
            raise ConnectionError(f"{lost} bytes of the answer were lost on their way") from error


class Receiver:
    """Takes streams. It listens from the first one on, at `host`, on a free port, in the event loop that asks."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._key = secrets.token_bytes(KEY_BYTES)
        self._streams: dict[int, Stream] = {}
        self._count = 0
        self._connections: set[_Incoming] = set()
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()

    async def open(self) -> Stream:
        """A new stream, to be given back with `close`."""
        port = await self._port()
        self._count += 1
        stream = Stream(Target(self._host, port, self._key, self._count))
        self._streams[self._count] = stream
        return stream

    def close(self, stream: Stream) -> None:
        """What still arrives of it is dropped."""
        self._streams.pop(stream.target.stream, None)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for connection in list(self._connections):
                connection.abort()
            await self._server.wait_closed()

    async def _port(self) -> int:
        if self._server is None:
            async with self._opening:
                if self._server is None:
                    loop = asyncio.get_running_loop()
                    self._server = await loop.create_server(self._incoming, self._host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _incoming(self) -> "_Incoming":
        return _Incoming(self._key, self._streams, self._connections)


class _Incoming(asyncio.Protocol):
    """One connection of a replica, as the receiver sees it."""

    def __init__(self, key: bytes, streams: dict[int, Stream], connections: "set[_Incoming]") -> None:
        self._key = key
        self._streams = streams
        self._connections = connections
        self._is_known = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports, which Serve's replicas have, are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)
        if sum(not one._is_known for one in self._connections) > MAX_STRANGERS:
            self.abort()
        else:
            asyncio.get_running_loop().call_later(KEY_S, self._require_key)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._connections.discard(self)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        at = 0
        if not self._is_known:
            if len(data) < KEY_BYTES:
                self._rest = data
                return
            if not secrets.compare_digest(data[:KEY_BYTES], self._key):
                self.abort()
                return
            self._is_known = True
            at = KEY_BYTES
        end = len(data)
        while end - at >= _HEADER.size:
            number, length = _HEADER.unpack_from(data, at)
            if length > MAX_WAITING_BYTES:
                self.abort()
                return
            start = at + _HEADER.size
            if end - start < length:
                break
            at = start + length
            if stream := self._streams.get(number):
                stream.put(data[start:at])
        self._rest = data[at:]

    def _require_key(self) -> None:
        if not self._is_known:
            self.abort()


class Sender:
    """Sends streams from a replica, over one connection to each receiver."""

    def __init__(self) -> None:
        self._connections: dict[Address, _Outgoing] = {}
        # Connections that are being made. Each has its own, so that a receiver that is gone holds up no other one.
        self._opening: dict[Address, asyncio.Task[_Outgoing]] = {}

    async def open(self, target: Target) -> "Outlet":
        """Where a stream is put in. Raises ConnectionError if the receiver cannot be reached."""
        connection = self._connections.get((target.host, target.port, target.key))
        if connection is None or connection.is_lost:
            connection = await self._connected(target)
        return Outlet(connection, target.stream)

    async def _connected(self, target: Target) -> "_Outgoing":
        """Who waits for the same connection gets it together, and hears together that it cannot be made."""
        address = (target.host, target.port, target.key)
        opening = self._opening.get(address)
        if opening is None:
            opening = self._opening[address] = asyncio.create_task(self._connect(address))
            opening.add_done_callback(lambda _: self._opening.pop(address))
        return await asyncio.shield(opening)

    async def _connect(self, address: Address) -> "_Outgoing":
        host, port, key = address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(_Outgoing, host, port)
        except (OSError, TimeoutError) as error:
            raise ConnectionError(f"who asked for the stream cannot be reached: {error}") from error
        connection.begin(key)
        self._connections = {one: known for one, known in self._connections.items() if not known.is_lost}
        self._connections[address] = connection
        return connection

    def stop(self) -> None:
        for opening in self._opening.values():
            opening.cancel()
        for connection in self._connections.values():
            connection.abort()


class Outlet:
    """One stream of a replica, all of which takes the same connection, so that nothing is missing in its middle."""

    def __init__(self, connection: "_Outgoing", stream: int) -> None:
        self._connection = connection
        self._stream = stream

    async def send(self, data: bytes) -> None:
        """Returns once the data is on its way. Raises ConnectionError if the connection is lost, and ValueError."""
        if len(data) > MAX_WAITING_BYTES:
            raise ValueError(f"an event of {len(data)} bytes; allowed: at most {MAX_WAITING_BYTES}")
        if not self._connection.has_room.is_set():
            await self._connection.has_room.wait()
        self._connection.send(self._stream, data)


class _Outgoing(asyncio.Protocol):
    """One connection to a receiver, as a replica sees it."""

    def __init__(self) -> None:
        self.is_lost = False
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports, which Serve's replicas have, are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=MAX_WAITING_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self.is_lost = True
        self.has_room.set()

    def pause_writing(self) -> None:
        self.has_room.clear()

    def resume_writing(self) -> None:
        self.has_room.set()

    def begin(self, key: bytes) -> None:
        self._transport.write(key)

    def send(self, stream: int, data: bytes) -> None:
        if self.is_lost:
            raise ConnectionError("who asked for the stream is gone")
        if not self._pending:  # what the other streams have ready in this turn of the event loop leaves with it
            self._loop.call_soon(self._flush)
        self._pending += (_HEADER.pack(stream, len(data)), data)

    def abort(self) -> None:
        self._transport.abort()

    def _flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        if not self.is_lost:
            self._transport.write(data)
