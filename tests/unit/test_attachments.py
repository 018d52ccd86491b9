"""Attachments: texts become text, images become data: addresses for models that take them, and nothing else passes."""

import base64
import http.server
import io
import random
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image
from pydantic import TypeAdapter

from stack import attachments
from stack.api.messages import Content
from stack.attachments import openai_content, resolve, resolve_text, resolve_texts
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, NotFound, StackError, TooLarge, Unavailable
from stack.fetcher import Fetcher
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine
from tests.unit.test_fetcher import (
    HOST,
    Answer,
    Authority,
    authority,  # noqa: F401  a fixture
    is_this_machine,
    says_nothing,
    sends,
    serving,
)

CONTENT: TypeAdapter[Any] = TypeAdapter(Content)
MODELS = [{"id": "small", "path": "models/small"}, {"id": "seeing", "path": "models/small", "images": True}]


def image(kind: str = "PNG", width: int = 3, height: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG with no pixels behind its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 100) + b"IDAT"


def data_url(content: bytes, mime_type: str = "image/png") -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"


def attachment(content: Any, mime_type: str = "text/plain") -> dict[str, Any]:
    return {"content": content, "mime_type": mime_type}


def user(content: Any) -> list[dict[str, Any]]:
    """A user's message whose content is in the Stack's shape."""
    return [{"role": "user", "content": openai_content(CONTENT.validate_python(content))}]


def picture(url: str, **more: Any) -> list[dict[str, Any]]:
    """A user's message with an image in OpenAI's shape."""
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, **more}}]}]


@pytest.fixture
def context(home: Path, new_sqlite_file: Path) -> Iterator[Context]:
    """A context whose database does not matter."""
    shutil.copy(new_sqlite_file, home / "stack.db")
    context = Context.open(Config.parse(CONFIG, "the tests' config"), engine=ScriptedEngine())
    yield context
    context.close()


@pytest.fixture
def seeing(context: Context) -> Context:
    """A context with a model that takes images beside one that does not."""
    config = Config.parse(CONFIG | {"models": MODELS}, "the test's config")
    return replace(context, config=config)


@pytest.fixture
def at_host(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:  # noqa: F811
    """Makes a server of this machine answer so, and gives its address."""
    open_servers = []

    def serve(answer: Answer, **options: Any) -> str:
        server = serving(authority.server(HOST), answer)
        port, requests = server.__enter__()
        open_servers.append(server)
        fetcher = Fetcher(
            resolve=lambda *_: ["127.0.0.1"],
            is_allowed=is_this_machine,
            ports=frozenset({port}),
            tls=authority.client(),
            **options,
        )
        monkeypatch.setattr(attachments, "FETCHER", fetcher)
        serve.requests = requests  # type: ignore[attr-defined]
        return f"https://{HOST}:{port}"

    yield serve
    for server in open_servers:
        server.__exit__(None, None, None)


async def text_of(context: Context, content: Any) -> Any:
    (message,) = await resolve(context, "small", user(content))
    return message["content"]


# Text alone


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "assistant"}],
        [],
    ],
)
async def test_messages_of_text_alone_are_left_alone(context: Context, messages: list[dict[str, Any]]) -> None:
    assert await resolve(context, "none", messages) is messages


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        (["a"], "a"),
        ([["a", "b"]], "ab"),
        ([[]], ""),
        ([""], ""),
        (["a", None], "a"),
        (["a", ""], "a"),
        (["a", []], "a"),
        (["a", ["b", "c"]], "a\n\nbc"),
        (["", "b"], "b"),
    ],
)
def test_contents_of_text_are_one_text(contents: list[Any], text: str) -> None:
    assert openai_content(*contents) == text


# Text attachments


@pytest.mark.parametrize(
    ("content", "mime_type", "expected"),
    [
        ("a,b\n1,2", "text/csv", "Attachment (text/csv):\na,b\n1,2"),
        (["a,", "b"], "text/csv", "Attachment (text/csv):\na,b"),
        ("# Ä", "text/markdown", "Attachment (text/markdown):\n# Ä"),
        ('{"a": 1}', "application/json", 'Attachment (application/json):\n{"a": 1}'),
        ("a", "Text/Plain; charset=UTF-8", "Attachment (text/plain):\na"),
        ("data: is what we have", "text/plain", "Attachment (text/plain):\ndata: is what we have"),
        ("https://a.org is a site", "text/plain", "Attachment (text/plain):\nhttps://a.org is a site"),
        (["https://a.org"], "text/plain", "Attachment (text/plain):\nhttps://a.org"),
        ("data:text/csv;base64,YSxi", "text/csv", "Attachment (text/csv):\na,b"),
        ("DATA:text/csv;base64,YSxi", "text/csv", "Attachment (text/csv):\na,b"),
        ("https:a", "text/plain", "Attachment (text/plain):\nhttps:a"),
        ("data:;base64,YSxi", "text/csv", "Attachment (text/csv):\na,b"),
        ("data:text/csv;charset=utf-8;base64,YSxi", "text/csv", "Attachment (text/csv):\na,b"),
        ("data:;base64,YQ%3D%3D", "text/plain", "Attachment (text/plain):\na"),
        ("data:,a%20b%C3%A4", "text/plain", "Attachment (text/plain):\na bä"),
        ("data:,", "text/plain", "Attachment (text/plain):\n"),
        ("", "text/plain", "Attachment (text/plain):\n"),
        (data_url("\ufeffa".encode(), "text/plain"), "text/plain", "Attachment (text/plain):\na"),
    ],
)
async def test_a_text_attachment_becomes_text_with_a_line_that_names_it(
    context: Context, content: Any, mime_type: str, expected: str
) -> None:
    assert await text_of(context, attachment(content, mime_type)) == expected


async def test_text_attachments_are_paragraphs_of_the_text_around(context: Context) -> None:
    content = ["Which is ", "longer?", attachment("one\n"), attachment("three"), "Say it."]
    first, second = "Attachment (text/plain):\none", "Attachment (text/plain):\nthree"
    assert await text_of(context, content) == f"Which is longer?\n\n{first}\n\n{second}\n\nSay it."


async def test_the_other_messages_stay_as_they_are(context: Context) -> None:
    before = {"role": "system", "content": "Be brief."}
    after = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    messages = [before, {**user(attachment("a"))[0], "name": "Ann"}, after]
    resolved = await resolve(context, "small", messages)
    assert resolved == [before, {"role": "user", "content": "Attachment (text/plain):\na", "name": "Ann"}, after]


async def test_an_attachment_of_retrieved_context_comes_behind_the_question(context: Context) -> None:
    content = openai_content("Where?", [CONTENT.validate_python(attachment("a map"))])
    (message,) = await resolve(context, "small", [{"role": "user", "content": content}])
    assert message["content"] == "Where?\n\nAttachment (text/plain):\na map"


async def test_a_text_is_fetched_and_named_after_its_address(context: Context, at_host: Any) -> None:
    url = at_host(sends(content="a,ü".encode()))
    found = await text_of(context, attachment(f"{url}/deep/my%20table%0A.csv?x=1", "text/csv"))
    assert found == "Attachment my table.csv (text/csv):\na,ü"
    assert [path for path, _ in at_host.requests] == ["/deep/my%20table%0A.csv?x=1"]


@pytest.mark.parametrize(
    ("content", "text"),
    [("a", "a"), (["a", "b"], "ab"), ([], ""), (["a", attachment("b", "text/csv")], "a\n\nAttachment (text/csv):\nb")],
)
async def test_a_content_can_be_had_as_one_text(content: Any, text: str) -> None:
    assert await resolve_text(CONTENT.validate_python(content)) == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (attachment(data_url(image()), "image/png"), "an image cannot be continued"),
        (attachment("a", "video/mp4"), "'video/mp4' cannot be used"),
        (attachment("file:///etc/passwd"), "allowed: https://host/path"),
        ([attachment("a")] * 21, "21 attachments; allowed: at most 20"),
    ],
)
async def test_what_cannot_be_had_as_one_text_is_refused(content: Any, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        await resolve_text(CONTENT.validate_python(content))
    assert words in caught.value.message
    assert caught.value.param == "content"


async def test_contents_of_a_request_share_its_bounds_and_are_named_by_their_places() -> None:
    def placed(*contents: Any) -> list[tuple[Any, str]]:
        return [(CONTENT.validate_python(one), f"messages.{at}.content") for at, one in enumerate(contents)]

    text = attachment("b", "text/csv")
    assert await resolve_texts(placed("a", text, ["c", text])) == [
        "a",
        "Attachment (text/csv):\nb",
        "c\n\nAttachment (text/csv):\nb",
    ]
    assert await resolve_texts([]) == []
    await resolve_texts(placed([text] * 10, [text] * 10))
    with pytest.raises(BadInput, match="21 attachments; allowed: at most 20") as caught:
        await resolve_texts(placed([text] * 10, [text] * 11))
    assert caught.value.param == "messages"
    with pytest.raises(TooLarge, match="together") as large:
        await resolve_texts(placed(attachment("x" * attachments.MAX_TEXT_BYTES), text))
    assert large.value.param == "messages.1.content"
    with pytest.raises(BadInput, match="an image cannot be continued") as image_there:
        await resolve_texts(placed("a", attachment(data_url(image()), "image/png")))
    assert image_there.value.param == "messages.1.content"


# Images


@pytest.mark.parametrize(
    ("kind", "mime_type"),
    [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif")],
)
async def test_an_image_is_passed_on_as_a_data_address(seeing: Context, kind: str, mime_type: str) -> None:
    url = data_url(image(kind), mime_type)
    (message,) = await resolve(seeing, "seeing", user(["What is it?", attachment(url, mime_type)]))
    shown = {"type": "image_url", "image_url": {"url": url}}
    assert message["content"] == [{"type": "text", "text": "What is it?"}, shown]


async def test_an_image_in_openais_shape_is_passed_on_with_its_detail(seeing: Context) -> None:
    url = data_url(image())
    for more in ({}, {"detail": "low"}):
        messages = picture(url, **more)
        assert await resolve(seeing, "seeing", messages) == messages


async def test_the_type_that_is_passed_on_is_that_of_the_bytes(seeing: Context) -> None:
    (message,) = await resolve(seeing, "seeing", picture(data_url(image("JPEG"), "image/png")))
    assert message["content"][0]["image_url"]["url"] == data_url(image("JPEG"), "image/jpeg")


async def test_an_image_is_fetched_and_its_address_is_not_passed_on(seeing: Context, at_host: Any) -> None:
    url = at_host(sends(content=image()))
    (message,) = await resolve(seeing, "seeing", picture(f"{url}/a.png"))
    assert message["content"] == [{"type": "image_url", "image_url": {"url": data_url(image())}}]


async def test_images_and_texts_keep_their_order(seeing: Context) -> None:
    pictures = [data_url(image(width=width)) for width in (1, 2)]
    content = [
        attachment(pictures[0], "image/png"), "one", attachment("x"), attachment(pictures[1], "image/png"), "two",
    ]  # fmt: skip
    (message,) = await resolve(seeing, "seeing", user(content))
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": pictures[0]}},
        {"type": "text", "text": "one\n\nAttachment (text/plain):\nx"},
        {"type": "image_url", "image_url": {"url": pictures[1]}},
        {"type": "text", "text": "two"},
    ]


async def test_a_model_of_text_alone_refuses_images_before_any_is_fetched(seeing: Context, at_host: Any) -> None:
    url = at_host(sends(content=image()))
    for messages in (picture(f"{url}/a.png"), user(attachment(f"{url}/a.png", "image/png"))):
        with pytest.raises(
            BadInput, match="'small' takes text only, and no images; those that take images: seeing"
        ) as caught:
            await resolve(seeing, "small", messages)
        assert caught.value.param == "messages.0.content"
    assert at_host.requests == []


async def test_where_no_model_takes_images_it_is_said(context: Context) -> None:
    with pytest.raises(BadInput, match="no model here takes images"):
        await resolve(context, "small", picture(data_url(image())))


async def test_an_unknown_model_is_not_found_before_anything_is_fetched(context: Context, at_host: Any) -> None:
    url = at_host(sends(content=image()))
    for messages in (picture(f"{url}/a.png"), user(attachment(f"{url}/a.txt"))):
        with pytest.raises(NotFound, match="there is no model 'big'"):
            await resolve(context, "big", messages)
    assert at_host.requests == []


@pytest.mark.parametrize(("role", "is_allowed"), [("user", True), ("tool", True), ("system", False)])
async def test_images_stand_in_messages_of_users_and_tools(seeing: Context, role: str, is_allowed: bool) -> None:
    messages = [dict(message, role=role) for message in picture(data_url(image()))]
    if is_allowed:
        assert await resolve(seeing, "seeing", messages) == messages
    else:
        with pytest.raises(BadInput, match="role 'system' cannot hold an image"):
            await resolve(seeing, "seeing", messages)


# What is refused


@pytest.mark.parametrize(
    ("content", "mime_type", "words"),
    [
        ("a", "application/pdf", "'application/pdf' cannot be used; allowed: text/*, application/json"),
        ("a", "image/svg+xml", "'image/svg+xml' cannot be used"),
        ("a", "nonsense", "'nonsense' cannot be used"),
        ("a", "text/plain; charset=latin-1", "the charset 'latin-1' cannot be used; allowed: utf-8"),
        ("data:text/csv;base64,YQ==", "text/plain", "the mime_type is 'text/plain', but"),
        ("data:text/plain;charset=latin-1,a", "text/plain", "the charset 'latin-1'"),
        ("data:text/plain;base64", "text/plain", "is no data: address; allowed: data:TYPE;base64,CONTENT"),
        ("data:;base64,####", "text/plain", "does not hold base64"),
        ("data:;base64,YQ", "text/plain", "does not hold base64"),
        ("data:;base64,ä", "text/plain", "does not hold base64"),
        (data_url(b"\xff\xfe", "text/plain"), "text/plain", "not UTF-8: invalid start byte at byte 0"),
        ("data:,%FF", "text/plain", "not UTF-8"),
        ("http://example.org/a.txt", "text/plain", "allowed: https://host/path"),
        ("file:///etc/passwd", "text/plain", "allowed: https://host/path"),
        ("FILE:///etc/passwd", "text/plain", "allowed: https://host/path"),
        ("https://127.0.0.1/a.txt", "text/plain", "not only, at public addresses"),
        ("https://169.254.169.254/latest/meta-data", "text/plain", "not only, at public addresses"),
        ("https://[::1/a.txt", "text/plain", "is no address"),
        ("https://[::1/a.png", "image/png", "is no address"),
        ("https://localhost:8265/a.png", "image/png", "the port 8265 may not be asked"),
        ("red dot", "image/png", "an image must be at a data: or https: address"),
        (data_url(b"GIF89a"), "image/png", "no image that can be read"),
        (data_url(b""), "image/png", "no image that can be read"),
        (data_url(b"<svg/>"), "image/png", "no image that can be read; allowed: image/png, image/jpeg"),
        (data_url(image("BMP")), "image/png", "no image that can be read"),
        (data_url(image("GIF")), "image/png", "the image is image/gif, but its mime_type is image/png"),
    ],
)
async def test_what_cannot_be_used_is_refused_with_its_place(
    seeing: Context, content: Any, mime_type: str, words: str
) -> None:
    messages = [{"role": "system", "content": "a"}, *user(["b", attachment(content, mime_type)])]
    with pytest.raises(BadInput) as caught:
        await resolve(seeing, "seeing", messages)
    assert words in caught.value.message
    assert caught.value.param == "messages.1.content"


@pytest.mark.parametrize("url", ["", "a.png", "/etc/passwd", "ftp://example.org/a", "data", "http://example.org/a"])
async def test_an_image_in_openais_shape_must_be_at_an_address(seeing: Context, url: str) -> None:
    with pytest.raises(BadInput) as caught:
        await resolve(seeing, "seeing", picture(url))
    assert caught.value.param == "messages.0.content"


@pytest.mark.parametrize("status", [404, 302, 500])
async def test_what_cannot_be_fetched_is_an_error(context: Context, at_host: Any, status: int) -> None:
    url = at_host(sends(status=status, Location="https://127.0.0.1/"))
    with pytest.raises(Unavailable if status == 500 else BadInput) as caught:
        await resolve(context, "small", user(attachment(f"{url}/a.txt")))
    assert caught.value.param == "messages.0.content"


# Bounds


@pytest.mark.parametrize(
    ("width", "height", "is_allowed"),
    [
        (4_096, 4_096, True),
        (4_097, 4_096, False),
        (16_385, 1, False),
        (1, 16_385, False),
        (2**31 - 1, 2**31 - 1, False),
    ],
)
async def test_pixels_are_bounded_by_what_the_header_says(
    seeing: Context, width: int, height: int, is_allowed: bool
) -> None:
    messages = picture(data_url(png_that_claims(width, height)))
    if is_allowed:
        assert await resolve(seeing, "seeing", messages) == messages
    else:
        with pytest.raises(TooLarge, match="pixels"):
            await resolve(seeing, "seeing", messages)


@pytest.mark.parametrize(
    ("kind", "at", "piece"),
    [
        ("PNG", lambda _: 33, struct.pack(">I", 0) + b"aaAa" + struct.pack(">I", zlib.crc32(b"aaAa"))),
        ("JPEG", lambda _: 2, b"\xff\xe2\x00\x02"),
        ("GIF", lambda whole: 13 + 3 * (2 << (whole[10] & 7)), b"\x21\xfe\x01a\x00"),
    ],
)
async def test_the_pieces_of_a_header_are_bounded(
    seeing: Context, kind: str, at: Callable[[bytes], int], piece: bytes
) -> None:
    async def is_taken(pieces: int) -> bool:
        whole = image(kind)
        start = at(whole)
        try:
            await resolve(seeing, "seeing", picture(data_url(whole[:start] + piece * pieces + whole[start:])))
        except BadInput:
            return False
        return True

    assert await is_taken(10)
    assert not await is_taken(attachments.MAX_HEADER_BYTES // len(piece))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("GIF", "P")])
async def test_what_comes_behind_a_header_may_be_longer(seeing: Context, kind: str, mode: str) -> None:
    width = 1_200
    noise = random.Random(1).randbytes(width * width * len(mode))
    file = io.BytesIO()
    Image.frombytes(mode, (width, width), noise).save(file, kind, quality=100)
    assert len(file.getvalue()) > attachments.MAX_HEADER_BYTES
    await resolve(seeing, "seeing", picture(data_url(file.getvalue())))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_a_broken_image_is_never_a_fault_of_ours(seeing: Context, kind: str) -> None:
    whole = image(kind, 40, 30)
    broken = [whole[:length] for length in range(0, len(whole), 7)]
    broken += [whole[:at] + b"\xff\x00\xff" + whole[at + 3 :] for at in range(0, min(len(whole), 400), 3)]
    for content in broken:
        try:
            await resolve(seeing, "seeing", picture(data_url(content)))
        except StackError as error:
            assert error.status in (400, 413)  # noqa: PT017  whether it can be read is the library's to say


async def test_the_number_of_attachments_is_bounded(context: Context) -> None:
    messages = user([attachment("a")] * 10)
    await resolve(context, "small", messages * 2)
    with pytest.raises(BadInput, match="30 attachments; allowed: at most 20"):
        await resolve(context, "small", messages * 3)


async def test_the_bytes_of_a_text_are_bounded_wherever_it_lies(context: Context, at_host: Any) -> None:
    long = b"x" * (attachments.MAX_TEXT_BYTES + 1)
    url = at_host(sends(content=long))
    for content in (long.decode(), data_url(long, "text/plain"), f"data:,{long.decode()}", f"{url}/a.txt"):
        with pytest.raises(TooLarge, match=str(attachments.MAX_TEXT_BYTES)):
            await resolve(context, "small", user(attachment(content)))
    assert len(await text_of(context, attachment(long[1:].decode()))) > len(long)


async def test_the_texts_of_a_request_are_bounded_together(context: Context) -> None:
    half = attachment("x" * (attachments.MAX_TEXT_BYTES // 2))
    await resolve(context, "small", user([half, half]))
    with pytest.raises(TooLarge, match="together"):
        await resolve(context, "small", user([half, half, attachment("x")]))


async def test_the_images_of_a_request_are_bounded_each_and_together(
    seeing: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(image())
    monkeypatch.setattr(attachments, "MAX_IMAGES_BYTES", 2 * size)
    one = picture(data_url(image()))
    await resolve(seeing, "seeing", one * 2)
    with pytest.raises(TooLarge, match="together"):
        await resolve(seeing, "seeing", one * 3)
    monkeypatch.setattr(attachments, "MAX_IMAGE_BYTES", size - 1)
    with pytest.raises(TooLarge, match=f"{size} bytes; allowed: {size - 1}"):
        await resolve(seeing, "seeing", one)


async def test_a_server_that_says_nothing_is_given_up(context: Context, at_host: Any) -> None:
    url = at_host(says_nothing, idle_seconds=0.2)
    with pytest.raises(Unavailable, match="does not answer"):
        await resolve(context, "small", user(attachment(f"{url}/a.txt")))


class Waiting(Fetcher):
    """Fetches nothing until it is let go."""

    let_go = threading.Event()

    def fetch(self, url: str, into: BinaryIO, most: int) -> None:
        assert self.let_go.wait(timeout=30)


async def test_all_fetches_of_a_request_have_a_time_together(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "FETCHER", Waiting())
    monkeypatch.setattr(attachments, "SECONDS", 0.05)
    try:
        with pytest.raises(Unavailable, match=r"not there within 0.05 s"):
            await resolve(context, "small", user([attachment("https://example.org/a.txt")] * 20))
    finally:
        Waiting.let_go.set()


async def test_fetches_of_a_request_run_together_but_not_too_many(context: Context, at_host: Any) -> None:
    at_once = threading.Barrier(attachments.AT_ONCE)

    def meets_the_others(handler: http.server.BaseHTTPRequestHandler) -> None:
        at_once.wait(timeout=10)
        sends(content=b"a")(handler)

    url = at_host(meets_the_others)
    content = await text_of(context, [attachment(f"{url}/{number}.txt") for number in range(2 * attachments.AT_ONCE)])
    assert [line for line in content.splitlines() if line.startswith("Attachment")] == [
        f"Attachment {number}.txt (text/plain):" for number in range(2 * attachments.AT_ONCE)
    ]
