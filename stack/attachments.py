"""Attachments and images of messages: from where they lie to what a model reads.

Texts become text, with a line that names them. Images become data: addresses, for models that take images: an engine
never fetches anything by itself. What lies elsewhere is fetched through the guarded fetcher.
"""

import asyncio
import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from PIL import Image

from stack.addresses import address_in, decoded
from stack.api.messages import MAX_CHARACTERS, Attachment
from stack.context import Context
from stack.errors import BadInput, StackError, TooLarge, Unavailable
from stack.fetcher import Fetcher

# Of one request, in all its messages.
MAX_ATTACHMENTS = 20
MAX_TEXT_BYTES = MAX_CHARACTERS
MAX_IMAGES_BYTES = 32 * 2**20
# Of one image.
MAX_IMAGE_BYTES = 10 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_PIXELS = 4_096 * 4_096
MAX_SIDE = 16_384
# Of one request, together.
SECONDS = 60
AT_ONCE = 4

FETCHER = Fetcher(seconds=20, idle_seconds=5)
# Fetches wait for others: they have threads of their own, which are not those of the routes.
_FETCHES = ThreadPoolExecutor(32, thread_name_prefix="attachment")

_IMAGES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_TEXTS = (
    "application/json",
    "application/jsonl",
    "application/x-ndjson",
    "application/xml",
    "application/yaml",
    "application/x-yaml",
)
_ALIASES = {"image/jpg": "image/jpeg"}
_ALLOWED = ", ".join(["text/*", *_TEXTS, *_IMAGES.values()])
_ROLES_WITH_IMAGES = ("user", "tool")

# A content in OpenAI's shape. Beside OpenAI's kinds of parts there may be {"type": "attachment", "attachment": {…}}.
OpenAIContent = str | list[dict[str, Any]]
StackContent = str | Attachment | list[str | Attachment]


def openai_content(*contents: StackContent | None) -> OpenAIContent:
    """Contents in OpenAI's shape, behind one another with an empty line between: a text, or parts for `resolve`."""
    parts: list[str | Attachment] = []
    for content in contents:
        more = content if isinstance(content, list) else [content or ""]
        if not any(more):
            continue
        parts += ["\n\n", *more] if parts else more
    if all(isinstance(part, str) for part in parts):
        return "".join(cast(list[str], parts))
    return [_text(part) if isinstance(part, str) else _unresolved(part) for part in parts]


async def resolve(context: Context, model: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages with every attachment and image in place, as text or as a data: address.

    Messages of text alone are returned as they are. Raises BadInput for what is not allowed or cannot be had, and for
    images where the model takes none, NotFound for an unknown model, TooLarge, and Unavailable where nobody answers.
    """
    wanted = [
        _Wanted.of(message, part, f"messages.{number}.content")
        for number, message in enumerate(messages)
        for part in _parts(message)
        if not _is_text(part)
    ]
    if not wanted:
        return messages
    await _require_taken(context, model, wanted)
    had = iter(await _get_all(wanted))
    return [_with(message, had) for message in messages]


async def resolve_text(content: StackContent) -> str:
    """A content as one text, with every attachment in place. Raises as `resolve` does, and BadInput for images."""
    (text,) = await resolve_texts([(content, "content")])
    return text


async def resolve_texts(contents: Sequence[tuple[StackContent, str]]) -> list[str]:
    """Contents of one request as a text each, as `resolve_text` gives it: the bounds are those of all together.

    Each comes with its place, which errors name.
    """
    messages = [{"role": "user", "content": openai_content(content)} for content, _ in contents]
    wanted = [
        _Wanted.of(message, part, place)
        for message, (_, place) in zip(messages, contents, strict=True)
        for part in _parts(message)
        if not _is_text(part)
    ]
    if image := next((one for one in wanted if one.is_image), None):
        raise BadInput(
            "an image cannot be continued as a text; images stand in the messages of chats", param=image.place
        )
    had = iter(await _get_all(wanted))
    return [str(_with(message, had)["content"]) for message in messages]


@dataclass(frozen=True)
class _Wanted:
    """An attachment or image to be had: an address or the text itself, what it must be, and which field holds it."""

    content: str
    is_address: bool
    mime_type: str | None
    place: str
    detail: str | None = None

    @classmethod
    def of(cls, message: dict[str, Any], part: dict[str, Any], place: str) -> "_Wanted":
        if part["type"] == "image_url":
            image = part["image_url"]
            wanted = cls(image["url"], True, None, place, image.get("detail"))
        else:
            content, mime_type = part["attachment"]["content"], _mime_type(part["attachment"]["mime_type"], place)
            address = address_in(content) if isinstance(content, str) else None
            text = content if isinstance(content, str) else "".join(content)
            wanted = cls(address or text, address is not None, mime_type, place)
        if wanted.is_image and message["role"] not in _ROLES_WITH_IMAGES:
            raise BadInput(f"a message of the role {message['role']!r} cannot hold an image", param=place)
        if wanted.is_image and not wanted.is_address:
            raise BadInput("an image must be at a data: or https: address", param=place)
        return wanted

    @property
    def is_image(self) -> bool:
        return self.mime_type is None or self.mime_type in _IMAGES.values()

    @property
    def most(self) -> int:
        return MAX_IMAGE_BYTES if self.is_image else MAX_TEXT_BYTES


async def _require_taken(context: Context, model: str, wanted: list[_Wanted]) -> None:
    """Raises what can be told before anything is fetched: that there is no such model, or that it takes no images."""
    takes_images = (await context.models.find(model)).base.images
    images = [one for one in wanted if one.is_image]
    if images and not takes_images:
        models = await asyncio.to_thread(context.models.language_models)
        taking = [one.id for one in models if one.base.images]
        others = f"those that take images: {', '.join(taking)}" if taking else "no model here takes images"
        raise BadInput(f"the model {model!r} takes text only, and no images; {others}", param=images[0].place)


async def _get_all(wanted: list[_Wanted]) -> list[dict[str, Any]]:
    """The parts in OpenAI's shape, in order."""
    if len(wanted) > MAX_ATTACHMENTS:
        message = f"there are {len(wanted)} attachments; allowed: at most {MAX_ATTACHMENTS}"
        raise BadInput(message, param=wanted[0].place.partition(".")[0])
    slots = asyncio.Semaphore(AT_ONCE)
    left = {True: MAX_IMAGES_BYTES, False: MAX_TEXT_BYTES}

    async def get(one: _Wanted) -> dict[str, Any]:
        async with slots:
            part, size = await _get(one)
        left[one.is_image] -= size
        if left[one.is_image] < 0:
            kind, most = ("images", MAX_IMAGES_BYTES) if one.is_image else ("text attachments", MAX_TEXT_BYTES)
            raise TooLarge(f"the {kind} of the request have more than {most} bytes together", param=one.place)
        return part

    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            tasks = [group.create_task(get(one)) for one in wanted]
    except TimeoutError:
        raise Unavailable(f"the attachments were not there within {SECONDS} s") from None
    except ExceptionGroup as failed:  # by the first one, for which the others were given up
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _get(one: _Wanted) -> tuple[dict[str, Any], int]:
    """A part and how many bytes its content has. Threads do what takes time: waiting for others, and decoding."""
    if not one.is_address:
        return _get_now(one)
    if one.content.startswith("data:"):
        return await asyncio.to_thread(_get_now, one)
    return await asyncio.get_running_loop().run_in_executor(_FETCHES, _get_now, one)


def _get_now(one: _Wanted) -> tuple[dict[str, Any], int]:
    try:
        content = _bytes_of(one)
        if len(content) > one.most:
            raise TooLarge(f"the content has {len(content)} bytes; allowed: {one.most}")
        return (_image_part if one.is_image else _text_part)(one, content), len(content)
    except StackError as error:
        error.param = error.param or one.place
        raise


def _bytes_of(one: _Wanted) -> bytes:
    if not one.is_address:
        return one.content.encode()
    if one.content.startswith("data:"):
        return _decoded(one)
    into = io.BytesIO()
    FETCHER.fetch(one.content, into, one.most)
    return into.getvalue()


def _decoded(one: _Wanted) -> bytes:
    """The content of a data: address, if it is of the type that the attachment has."""
    mime_type, content = decoded(one.content, one.most)
    if mime_type and one.mime_type and _mime_type(mime_type, one.place) != one.mime_type:
        raise BadInput(f"the mime_type is {one.mime_type!r}, but that of the data: address is {mime_type[:200]!r}")
    return content


def _text_part(one: _Wanted, content: bytes) -> dict[str, Any]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"the attachment is not UTF-8: {error.reason} at byte {error.start}") from error
    name = _name_in(one.content) if one.is_address else ""
    return _text(f"Attachment{name and f' {name}'} ({one.mime_type}):\n{text}", is_attachment=True)


def _image_part(one: _Wanted, content: bytes) -> dict[str, Any]:
    mime_type = checked_image(content)
    if one.mime_type and mime_type != one.mime_type:
        raise BadInput(f"the image is {mime_type}, but its mime_type is {one.mime_type}")
    image = {"url": f"data:{mime_type};base64,{base64.b64encode(content).decode()}"}
    return {"type": "image_url", "image_url": image | ({"detail": one.detail} if one.detail else {})}


def checked_image(content: bytes) -> str:
    """The MIME type of an image, by its first bytes and its header. The pixels are not decoded."""
    # A header of millions of pieces would take seconds. WebP's is read whole, but fast.
    start = content if content[8:12] == b"WEBP" else content[:MAX_HEADER_BYTES]
    try:
        with Image.open(io.BytesIO(start), formats=list(_IMAGES)) as image:
            mime_type, (width, height) = _IMAGES.get(str(image.format), "image/jpeg"), image.size  # MPO is JPEG too
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"the image has more than {MAX_PIXELS} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        allowed = ", ".join(_IMAGES.values())
        raise BadInput(f"the content is no image that can be read; allowed: {allowed}") from error
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"the image has {width} x {height} pixels; allowed: {MAX_PIXELS}, and {MAX_SIDE} in width and height"
        )
    return mime_type


def _mime_type(given: str, place: str) -> str:
    """A type in lower case without its parameters, if it is one that can be used."""
    first, *parameters = (part.strip().lower() for part in given.split(";"))
    mime_type = _ALIASES.get(first, first)
    if not mime_type.startswith("text/") and mime_type not in (*_TEXTS, *_IMAGES.values()):
        raise BadInput(f"an attachment of the type {given[:200]!r} cannot be used; allowed: {_ALLOWED}", param=place)
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise BadInput(f"the charset {value[:100]!r} cannot be used; allowed: utf-8", param=place)
    return mime_type


def _name_in(url: str) -> str:
    """The name of what lies at an address, as it can stand in a line."""
    if url.startswith("data:"):
        return ""
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:100]


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_text(part: dict[str, Any]) -> bool:
    return bool(part["type"] == "text")


def _with(message: dict[str, Any], had: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """A message with the next of `had` in the places of those parts of it that are no text."""
    parts = _parts(message)
    if all(_is_text(part) for part in parts):
        return message
    return dict(message, content=_joined([part if _is_text(part) else next(had) for part in parts]))


def _text(text: str, **marks: bool) -> dict[str, Any]:
    return {"type": "text", "text": text, **marks}


def _unresolved(attachment: Attachment) -> dict[str, Any]:
    return {"type": "attachment", "attachment": attachment.model_dump()}


def _joined(parts: list[dict[str, Any]]) -> OpenAIContent:
    """Parts with neighbouring texts as one, and as one text if there is nothing else. Attachments are paragraphs."""
    joined: list[dict[str, Any]] = []
    for is_text, group in groupby(parts, key=_is_text):
        same = list(group)
        joined += [_text(_paragraphs(same))] if is_text else same
    return str(joined[0]["text"]) if len(joined) == 1 and _is_text(joined[0]) else joined


def _paragraphs(texts: list[dict[str, Any]]) -> str:
    """Texts behind one another, with an empty line between an attachment and what is beside it."""
    whole, was_attachment = "", False
    for part in texts:
        is_attachment = part.get("is_attachment", False)
        if whole and (is_attachment or was_attachment):
            whole = whole.rstrip("\n") + "\n\n"
        text = str(part["text"])
        whole += text.lstrip("\n") if was_attachment else text
        was_attachment = is_attachment
    return whole
