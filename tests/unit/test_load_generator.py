"""The load generator, against a server that cuts its answers as it likes. It needs a C compiler: apt install gcc."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from scripts import load_generator
from scripts.load_generator import Found, LoadGenerator, NoLoad

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices": [{"delta": {"content": "a \\"content\\": b"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":8,"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
ASK = {"stream": True}

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def generator() -> Iterator[LoadGenerator]:
    # With the compiler's own checks of every access.
    with LoadGenerator.compiled("-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined") as made:
        yield made


def chunk(part: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(part), part)


def chunked(*parts: bytes) -> bytes:
    return CHUNKED + b"".join(chunk(part) for part in parts) + b"0\r\n\r\n"


async def request_of(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of the next request; nothing where there is none any more."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b"", b""
    lines = head.lower().split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
    return head, await reader.readexactly(length)


@asynccontextmanager
async def serving(answer: Answer) -> AsyncGenerator[str]:
    """A server that answers each request of a connection in this way, and its address."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing() and (await request_of(reader))[0]:
                await answer(reader, writer)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"
    finally:
        server.close()
        await server.wait_closed()


async def asked(
    generator: LoadGenerator, answer: bytes, streams: int = 1, requests: int = 1, patience: float = 30
) -> Found:
    """What is found at a server that gives this answer in one piece, and then closes if it does not say how long."""

    async def give(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        head = answer.partition(b"\r\n\r\n")[0].lower()
        if b"content-length" not in head and b"chunked" not in head:
            writer.close()

    async with serving(give) as url:
        return await asyncio.to_thread(generator.ask, url, ASK, streams=streams, requests=requests, timeout=patience)


async def test_tokens_are_counted_by_the_usage_and_events_one_by_one(generator: LoadGenerator) -> None:
    found = await asked(generator, chunked(ROLE, TOKEN + TOKEN, TOKEN, USAGE + DONE), streams=3, requests=2)
    assert [request.stream for request in found.requests[:3]] == [0, 1, 2]
    assert len(found.requests) == 6
    assert (found.errors, found.tokens) == ([], 30)
    for request in found.requests:
        assert (request.status, request.events, request.texts, request.tokens) == (200, 5, 3, 5)
        assert request.bytes == len(ROLE + TOKEN * 3 + USAGE + DONE)
        assert request.first_s is not None
        assert request.last_s is not None
        assert 0 < request.first_s <= request.last_s
    assert found.seconds >= max(request.seconds for request in found.requests)
    assert found.cpu_seconds > 0


async def test_events_are_found_however_they_are_cut(generator: LoadGenerator) -> None:
    answer = chunked(ROLE + TOKEN, TOKEN[:20], TOKEN[20:] + USAGE[:9], USAGE[9:], DONE)

    async def byte_by_byte(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in range(len(answer)):
            writer.write(answer[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async with serving(byte_by_byte) as url:
        found = await asyncio.to_thread(generator.ask, url, ASK)
    (request,) = found.requests
    assert (request.error, request.events, request.texts, request.tokens) == (None, 4, 2, 5)


async def test_the_gaps_are_those_between_reads_that_brought_text(generator: LoadGenerator) -> None:
    async def slowly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + chunk(ROLE))
        for part in (TOKEN, TOKEN + TOKEN, TOKEN):
            await asyncio.sleep(0.1)
            writer.write(chunk(part))
            await writer.drain()
        writer.write(chunk(USAGE + DONE) + b"0\r\n\r\n")

    async with serving(slowly) as url:
        (request,) = (await asyncio.to_thread(generator.ask, url, ASK)).requests
    assert request.first_s is not None
    assert request.last_s is not None
    assert request.first_s > 0.09, "the role is no text"
    assert len(request.gaps_s) == 2
    assert sum(request.gaps_s) == pytest.approx(request.last_s - request.first_s, abs=1e-4)


async def test_a_request_is_sent_as_it_was_given_and_after_the_answer_before_it(generator: LoadGenerator) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := await request_of(reader))[0]:
            seen.append(request)
            writer.write(chunked(TOKEN, DONE))
        writer.close()

    body = {"text": "ü" * 100_000}
    async with await asyncio.start_server(connected, "127.0.0.1", 0, limit=2**20) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/path"
        found = await asyncio.to_thread(generator.ask, url, body, requests=3)
    assert found.errors == []
    assert len(seen) == 3
    for head, sent in seen:
        assert head.startswith(b"POST /path HTTP/1.1\r\n")
        assert json.loads(sent) == body


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Content-Length: %d\r\n\r\n" % len(TOKEN + USAGE + DONE) + TOKEN + USAGE + DONE,
        HEAD + b"Connection: close\r\n\r\n" + TOKEN + USAGE + DONE,
        b"HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n" + b'{"usage": {"completion_tokens": 5}}'[:34],
    ],
    ids=["length", "until the end", "no stream"],
)
async def test_answers_end_in_all_of_https_ways(generator: LoadGenerator, answer: bytes) -> None:
    found = await asked(generator, answer, requests=3)
    assert (found.errors, found.tokens) == ([], 15)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (chunked(TOKEN, b'data: {"error": {"message": "no"}}\n\n', DONE), "the server answered with an error"),
        (chunked(TOKEN), "the stream ended without [DONE]"),
        (CHUNKED + chunk(TOKEN) + b"no size\r\n", "the server sent a chunk without a size"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}", "the status is not 200"),
        (b"SSH-2.0-none\r\n\r\n", "the server does not speak HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "the server sent a Content-Length that is none"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, "the server sent a head that is too long"),
        (chunked(b"data: " + b"x" * 300_000), "the server sent a line that is too long"),
        (CHUNKED + b"1" * 20_000, "the server sent a head that is too long"),
        (HEAD + b"Content-Length: 500\r\nConnection: close\r\n\r\n" + TOKEN, "no whole answer in time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_wrong_is_named(generator: LoadGenerator, answer: bytes, error: str) -> None:
    found = await asked(generator, answer, streams=2, patience=0.5)
    assert [request.error for request in found.requests] == [error] * 2


async def test_a_server_that_leaves_in_the_middle_is_named(generator: LoadGenerator) -> None:
    async def leave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + chunk(TOKEN))
        writer.close()

    async with serving(leave) as url:
        found = await asyncio.to_thread(generator.ask, url, ASK, streams=2, requests=2)
    assert [request.error for request in found.requests] == ["the server closed the connection"] * 4


async def test_connections_are_kept_and_counted(generator: LoadGenerator) -> None:
    open_now = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        while (await request_of(reader))[0]:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()
        open_now -= 1

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/health"
        held = generator.idle(url, 50, at_once=5)
        idle = await asyncio.to_thread(held.__enter__)
        assert open_now == 50
        await asyncio.to_thread(held.__exit__, None, None, None)
    assert idle.still_open == 50


async def test_idle_connections_that_the_server_closes_are_not_counted(generator: LoadGenerator) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/health"
        held = generator.idle(url, 5)
        idle = await asyncio.to_thread(held.__enter__)
        await asyncio.to_thread(held.__exit__, None, None, None)
    assert idle.still_open == 0


def test_a_server_that_is_not_there_is_named(generator: LoadGenerator) -> None:
    with pytest.raises(NoLoad, match="takes no connection"):
        generator.ask("http://127.0.0.1:1/")
    with pytest.raises(NoLoad, match="3 of 3 idle connections"), generator.idle("http://127.0.0.1:1/", 3):
        pass


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_generator.shutil, "which", lambda _: None)
    with pytest.raises(NoLoad, match="apt install gcc"), LoadGenerator.compiled():
        pass
