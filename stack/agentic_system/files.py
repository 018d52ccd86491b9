"""The attachments of a turn: which are texts to be looked up, which the model sees, and what a tool gets as files."""

import asyncio
import io
import mimetypes
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

from stack.addresses import address_in, decoded
from stack.agentic_system.plan import is_clients
from stack.agentic_system.tools.tool import File
from stack.api.agent_tools import AgentTool, CodeInterpreterToolDefinition
from stack.api.messages import Attachment
from stack.attachments import FETCHER
from stack.errors import BadInput, StackError, Unavailable

# Of all files of a turn.
MAX_BYTES = 32 * 2**20
SECONDS = 60.0
_TEXTS = (
    "application/json",
    "application/jsonl",
    "application/pdf",
    "application/x-ndjson",
    "application/x-pdf",
    "application/xhtml+xml",
    "application/xml",
    "application/yaml",
    "application/x-yaml",
)
_FETCHES = ThreadPoolExecutor(8, thread_name_prefix="agent-file")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def is_text(attachment: Attachment) -> bool:
    """Whether it can be looked up: of a type that memory banks read."""
    kind = _kind(attachment)
    return kind.startswith("text/") or kind in _TEXTS


def is_image(attachment: Attachment) -> bool:
    return _kind(attachment).startswith("image/")


def are_read(tools: Sequence[AgentTool]) -> bool:
    """Whether a tool that is run here reads files. What the client or an address runs has those that are there."""
    return any(
        isinstance(tool, CodeInterpreterToolDefinition) and tool.remote_execution is None and not is_clients(tool)
        for tool in tools
    )


async def files_of(attachments: Sequence[Attachment]) -> list[File]:
    """Attachments as files, each under a name of its own. Raises BadInput and Unavailable for what cannot be had."""
    try:
        async with asyncio.timeout(SECONDS) as limit:
            return await _files_of(attachments)
    except TimeoutError:
        if not limit.expired():
            raise
        raise Unavailable(f"the attachments were not there within {SECONDS:g} s") from None


async def _files_of(attachments: Sequence[Attachment]) -> list[File]:
    loop = asyncio.get_running_loop()
    left = MAX_BYTES
    files: list[File] = []
    for at, attachment in enumerate(attachments):
        try:
            content = await loop.run_in_executor(_FETCHES, _content, attachment, left)
        except StackError as error:
            error.param = f"attachments.{at}.content"
            raise
        left -= len(content)
        if left < 0:
            raise BadInput(f"the attachments have more than {MAX_BYTES} bytes together", param="attachments")
        files.append(File(_free(_name(attachment, at), files), content))
    return files


def _content(attachment: Attachment, most: int) -> bytes:
    given = attachment.content
    address = address_in(given) if isinstance(given, str) else None
    if address is None:
        return (given if isinstance(given, str) else "".join(given)).encode("utf-8", "replace")
    if address.startswith("data:"):
        return decoded(address, most)[1]
    into = io.BytesIO()
    FETCHER.fetch(address, into, most)
    return into.getvalue()


def _name(attachment: Attachment, at: int) -> str:
    """The name in an attachment's address, or one made up, as it is safe for a file."""
    address = address_in(attachment.content) if isinstance(attachment.content, str) else None
    ending = mimetypes.guess_extension(_kind(attachment)) or ""
    if address is None or address.startswith("data:"):
        return f"attachment_{at + 1}{ending}"
    name = _UNSAFE.sub("_", unquote(urlsplit(address).path).rpartition("/")[2]).lstrip(".-")[-100:]
    return name or f"attachment_{at + 1}{ending}"


def _free(name: str, files: Sequence[File]) -> str:
    taken = {file.name for file in files}
    stem, dot, ending = name.rpartition(".")
    number = 1
    free = name
    while free in taken:
        number += 1
        free = f"{stem}_{number}.{ending}" if dot and stem else f"{name}_{number}"
    return free


def _kind(attachment: Attachment) -> str:
    return attachment.mime_type.partition(";")[0].strip().lower()
