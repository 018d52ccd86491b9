"""How many sandboxes run at once on a machine, whichever processes start them: each may take much of its memory.

A slot is a name of an abstract Unix socket. The kernel gives it to one holder at a time, and takes it back when that
process ends, however it does.
"""

import asyncio
import errno
import os
import socket

# How often a slot is asked for again: those who hold them are other processes, which tell nobody.
AGAIN_S = 0.1
PREFIX = f"stack-sandbox-{os.getuid()}"


class NoneFree(Exception):
    """All slots were taken for as long as one was waited for. The message says so."""


async def take(most: int, wait_s: float) -> socket.socket:
    """One of `most` slots, which is given back by closing it. Raises NoneFree."""
    loop = asyncio.get_running_loop()
    end = loop.time() + wait_s
    while (slot := _free(most)) is None:
        if loop.time() >= end:
            raise NoneFree(f"as many sandboxes run on the machine as may ({most}), and none ended within {wait_s:g} s")
        await asyncio.sleep(AGAIN_S)
    return slot


def _free(most: int) -> socket.socket | None:
    slot = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for number in range(most):
        try:
            slot.bind(f"\0{PREFIX}-{number}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                slot.close()
                raise
        else:
            return slot
    slot.close()
    return None
