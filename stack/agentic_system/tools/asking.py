"""How tools ask what is elsewhere: by the guarded fetcher, in threads of their own, cut off when they are cancelled."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from stack.agentic_system.tools.templates import Filled
from stack.agentic_system.tools.tool import ToolFailed
from stack.errors import BadInput, Unavailable
from stack.fetcher import Answer, Cut, Fetcher

MAX_ANSWER_BYTES = 2**20
# The loop's limit of a call comes before; this one is for a connection that it cannot reach.
SECONDS = 120
FETCHER = Fetcher(seconds=SECONDS, idle_seconds=SECONDS)
# For addresses of the config, which may be inside.
INNER_FETCHER = replace(FETCHER, is_allowed=lambda _: True, ports=None, takes_http=True)
_CALLS = ThreadPoolExecutor(32, thread_name_prefix="tool")


async def ask(fetcher: Fetcher, asked: Filled, most: int = MAX_ANSWER_BYTES) -> Answer:
    """What is answered. Raises ToolFailed where nobody answers as HTTP should, or more than `most` bytes.

    Being cancelled, it cuts the connection.
    """
    cut = Cut()
    call = partial(fetcher.ask, asked.url, asked.method, asked.headers, asked.content, most, cut)
    try:
        return await asyncio.get_running_loop().run_in_executor(_CALLS, call)
    except (BadInput, Unavailable) as error:
        raise ToolFailed(error.message) from error
    finally:
        cut()
