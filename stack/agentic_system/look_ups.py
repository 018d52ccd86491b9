"""What a turn has looked up in memory banks, by whoever has them: this process, or another one on this machine."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stack.api.agent_tools import MemoryToolDefinition
from stack.api.agentic_system import InputMessage
from stack.api.messages import Attachment
from stack.context import Context

if TYPE_CHECKING:
    from stack.memory_banks.banks import Memory


@dataclass(frozen=True)
class LookUp:
    """What is looked up for a turn: what its new messages ask about. Its text attachments are kept for it before.

    `tool` says in which banks; None is the session's own alone. `max_tokens` is what the model has room for.
    """

    turn_id: str
    session_id: str
    session_bank: str | None
    tool: MemoryToolDefinition | None
    messages: Sequence[InputMessage]
    attachments: Sequence[Attachment]
    max_tokens: int


# Gives the details of the memory step, in the name of the context's tenant. Raises as retrieval.retrieve does.
AskMemory = Callable[[Context, LookUp], Awaitable[dict[str, Any]]]


def here(memory: "Callable[[], Memory]") -> AskMemory:
    """Looks up in this process. `memory` opens what memory banks need, when a turn first asks one."""

    async def retrieve(context: Context, look_up: LookUp) -> dict[str, Any]:
        # What memory banks are made of is much to import, and turns that ask none have no need of it.
        from stack.agentic_system import retrieval

        return await retrieval.retrieve(context, memory(), look_up)

    return retrieve
