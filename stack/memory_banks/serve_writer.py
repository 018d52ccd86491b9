"""The writer behind Ray Serve: a deployment of the gateway's application (serve_apps/memory_writer.py)."""

import asyncio
from collections.abc import Sequence
from typing import Any

from stack.config import GATEWAY
from stack.errors import Away, StackError, Superseded, Unavailable
from stack.memory_banks.rows import Document
from stack.store import MemoryBank

NAME = "MemoryWriter"  # of the deployment
SECONDS = 120
AGAIN_S = 0.5


class ServeWriter:
    """Implements stack.memory_banks.writer.Writer.

    Where the writer dies, what it was doing may be done or not, which is Unavailable: every call can be repeated. One
    that another writer has replaced has done nothing: the other one is asked, once Serve gives the way to it.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def write(self, bank: MemoryBank, documents: Sequence[Document], replace: bool) -> None:
        await self._ask("write", bank, documents, replace)

    async def delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]:
        deleted: list[str] = await self._ask("delete", bank, document_ids)
        return deleted

    async def drop(self, bank: MemoryBank) -> None:
        await self._ask("drop", bank)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SECONDS
        while True:
            try:
                return await _answer(getattr(self._handle, method).remote(*arguments))
            except Superseded:
                if loop.time() > deadline:
                    raise
            await asyncio.sleep(AGAIN_S)


async def find() -> ServeWriter:
    """The writer, for a process that is no part of Ray Serve's. Raises Unavailable where it is not deployed."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        return ServeWriter(await asyncio.to_thread(serve.get_deployment_handle, NAME, GATEWAY))
    except (RayError, RayServeException) as error:
        raise Away("the writer of the memory banks is not deployed", retry_after=30) from error


async def _answer(call: Any) -> Any:
    """What a call of the writer gives. Being cancelled meanwhile cancels it, unless it has begun."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        async with asyncio.timeout(SECONDS):
            return await call
    except asyncio.CancelledError:
        call.cancel()
        raise
    except RayTaskError as error:  # before TimeoutError and others, which it may be too, where the writer raised it
        if isinstance(error.cause, StackError):
            raise error.cause from error
        raise
    except TimeoutError as error:
        call.cancel()
        raise Unavailable(f"the writer of the memory banks has not answered within {SECONDS} s; repeat it") from error
    except (RayError, RayServeException, ConnectionError) as error:
        raise Away("the writer of the memory banks does not answer now; repeat it") from error
