"""The content of documents: from what a client gives to bytes that can be read.

It comes with the document, as a text or in a data: address, or lies elsewhere: at an https address, which is fetched
through the guarded fetcher, in a file that was uploaded, or in one under the data folders.
"""

import asyncio
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from stack import uploads
from stack.addresses import address_in, decoded, shown
from stack.api.memory_banks import Address, MemoryBankDocument
from stack.context import Context
from stack.dataset_content import local_file, opened_file
from stack.errors import BadInput, StackError, TooLarge, Unavailable
from stack.fetcher import Fetcher
from stack.memory_banks.reading import MAX_BYTES
from stack.memory_banks.tasks import all_of

# Of all documents in one call.
MAX_ALL_BYTES = 64 * 2**20
SECONDS = 120
AT_ONCE = 4

FETCHER = Fetcher(seconds=60, idle_seconds=5)
# Fetches wait for others: they have threads of their own.
_FETCHES = ThreadPoolExecutor(16, thread_name_prefix="document")


def as_json(document: MemoryBankDocument) -> str:
    """The content as it was given."""
    content = document.content
    return json.dumps(content.model_dump() if isinstance(content, Address) else content, ensure_ascii=False)


async def contents(context: Context, documents: Sequence[MemoryBankDocument]) -> list[bytes]:
    """The bytes of documents, in their order.

    Raises BadInput for addresses that are not allowed or have nothing, NotFound for an upload that is not there,
    TooLarge, and Unavailable where nobody answers in time. Errors name the document.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    left = MAX_ALL_BYTES

    async def get(number: int, document: MemoryBankDocument) -> bytes:
        nonlocal left
        try:
            async with slots:
                content = await _content(context, document)
        except StackError as error:
            error.param = f"documents.{number}.content"
            raise
        left -= len(content)
        if left < 0:
            raise TooLarge(f"the documents have more than {MAX_ALL_BYTES} bytes together", param="documents")
        return content

    try:
        async with asyncio.timeout(SECONDS):
            return await all_of(get(number, one) for number, one in enumerate(documents))
    except TimeoutError:
        raise Unavailable(f"the documents were not there within {SECONDS} s") from None


def name_of(document: MemoryBankDocument) -> str:
    """A document, as errors name it."""
    return f"the document {document.document_id!r}"


async def _content(context: Context, document: MemoryBankDocument) -> bytes:
    content = document.content
    given = content.uri if isinstance(content, Address) else content
    address = address_in(given, "upload") if isinstance(given, str) else None
    if address is None:
        if isinstance(content, Address):
            allowed = "data:TYPE;base64,CONTENT, https://…, upload://…, file://…"
            raise BadInput(f"{shown(content.uri)} is no address of a document; allowed: {allowed}")
        return _bounded("".join(content).encode())
    if address.startswith("data:"):
        return await asyncio.to_thread(_decoded, document, address)
    if address.startswith(("upload:", "file:")):
        return await asyncio.to_thread(_read, context, address)
    return await asyncio.get_running_loop().run_in_executor(_FETCHES, _fetched, address)


def _decoded(document: MemoryBankDocument, address: str) -> bytes:
    mime_type, content = decoded(address, MAX_BYTES)
    given = document.mime_type.partition(";")[0].strip().lower()
    told = mime_type.partition(";")[0].strip().lower()
    if told and told != given:
        raise BadInput(f"the mime_type is {given!r}, but that of the data: address is {told[:200]!r}")
    return _bounded(content)


def _fetched(address: str) -> bytes:
    """What is at an https address; http too, which the fetcher refuses with what is allowed."""
    into = io.BytesIO()
    FETCHER.fetch(address, into, MAX_BYTES)
    return into.getvalue()


def _read(context: Context, address: str) -> bytes:
    path = uploads.local(context, address)[0] if address.startswith("upload:") else local_file(context, address)
    with opened_file(path, address) as file:
        return _bounded(file.read(MAX_BYTES + 1))


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise TooLarge(f"the content has more than {MAX_BYTES} bytes")
    return content
