"""One turn, from where its journal has it to its end, whatever that is.

Whoever runs a turn has taken it in its row, and goes on behind the last step that has ended. A step that had begun is
done again, but for calls of tools whose outcome nobody knows: the model is told that.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy.exc import SQLAlchemyError

from stack.agentic_system import files
from stack.agentic_system.conversation import Conversation
from stack.agentic_system.described import definitions
from stack.agentic_system.events import Stream
from stack.agentic_system.history import History
from stack.agentic_system.journal import Journal, JournalLost, ToEnd
from stack.agentic_system.loop import Loop, Place, retrieves
from stack.agentic_system.plan import Plan, plan_of
from stack.agentic_system.replay import retell, tell_end
from stack.agentic_system.tool_calls import CallContext
from stack.agentic_system.withheld import Withheld
from stack.api.agent_tools import names_of
from stack.api.agentic_system import AgentConfig, InputMessage, TurnState
from stack.api.messages import Attachment
from stack.errors import StackError, Unavailable
from stack.store.turns import Turn

logger = logging.getLogger("ray.serve")

# How often a turn is taken without the end of a step: what it needs may end the process that runs it each time.
MAX_TAKES = 10

_MESSAGES: TypeAdapter[list[InputMessage]] = TypeAdapter(list[InputMessage])
_ATTACHMENTS: TypeAdapter[list[Attachment]] = TypeAdapter(list[Attachment])


class TurnRun:
    """The running of one turn, which was taken: `run` it once, and `cancel` it at any time.

    `past` are the turns before it in its session, to which it is added at its end.
    """

    def __init__(self, place: Place, turn: Turn, stream: Stream, past: History, keys: Mapping[str, str]) -> None:
        self._place = place
        self._context = place.context.of_tenant(turn.tenant)
        self._bounds = place.context.config.agents
        self._stream = stream
        self._past = past
        self._keys = keys
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False
        self._made: _Made | None = None
        self._journal = Journal(self._context.store, turn)

    async def run(self) -> Turn:
        """The turn's row at its end, or where it awaits approval; its stream is finished then.

        Raises Conflict with the code "superseded" where another owner has taken it meanwhile, SQLAlchemyError or
        JournalLost where its journal cannot be written, and CancelledError where this is cancelled otherwise than by
        `cancel`: then the turn is left, as it is in its rows, to another owner.
        """
        # In a task of its own: what ends the turn ends nothing of whoever runs one turn after the other.
        work = asyncio.ensure_future(self._work())
        self._task = work
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            work.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # which nobody needs any more
            raise
        failure = self._failure(work)
        if self._journal.turn.state == TurnState.running:
            if self._made is not None:
                self._made.withheld.give_up()
            if failure is None:
                self._journal.cancel()
            else:
                self._journal.fail({"code": failure.code, "message": failure.message})
            self._journal.then(lambda: tell_end(self._stream, self._journal.turn, self._journal.steps, failure))
            await self._journal.commit()
        return self._journal.turn

    async def _work(self) -> None:
        self._made = await self._made_of_rows()
        if self.is_cancelled:
            raise ToEnd
        if self._journal.takes > MAX_TAKES:
            raise Unavailable(f"the turn was begun {MAX_TAKES} times, and none of them came to the end of a step")
        await self._to_its_end(self._made)

    def _failure(self, work: "asyncio.Task[None]") -> StackError | None:
        """What a turn fails by that is not at its end yet; None for one that is cancelled. Raises as `run` does."""
        if work.cancelled():
            # Where nobody has cancelled the turn, something that it waited for was, elsewhere.
            return None if self.is_cancelled else Unavailable("what the turn waited for was given up")
        error = work.exception()
        if error is None or isinstance(error, ToEnd):
            return None
        if isinstance(error, SQLAlchemyError | JournalLost):
            raise error
        if isinstance(error, StackError):
            if error.code == "superseded":
                raise error
            return error
        # A fault of ours ends the turn, for whose end others wait.
        logger.error("the turn %s failed", self._journal.turn.id, exc_info=error)
        return StackError("the turn failed by an internal error")

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled or self._journal.is_to_end

    def cancel(self) -> None:
        """Ends the turn, cancelled, unless it has ended by then."""
        if not self._is_cancelled:
            self._is_cancelled = True
            # Before, its rows are read, by which is known what nobody may see of it.
            if self._task is not None and self._made is not None:
                self._task.cancel()

    async def _made_of_rows(self) -> "_Made":
        """Reads, in one go, what the turn goes by beside its own row, and tells what has been."""

        def read() -> str | None:
            self._journal.load()
            session = self._context.store.agents.get_session(turn.tenant, turn.session_id)
            return session.memory_bank_id if session is not None else None

        turn = self._journal.turn
        session_bank = await asyncio.to_thread(read)
        config = AgentConfig.model_validate(turn.config)
        messages = _MESSAGES.validate_python(turn.request["messages"])
        attachments = _ATTACHMENTS.validate_python(turn.request["attachments"])
        looks_up = retrieves(config, messages, attachments, session_bank)
        plan = plan_of(config, turn.request["messages"], self._bounds, retrieves=looks_up)
        withheld = Withheld(plan, self._journal, self._stream)
        retell(self._stream, self._journal.steps)
        withheld.again()
        return _Made(config, messages, attachments, session_bank, plan, withheld)

    async def _to_its_end(self, made: "_Made") -> None:
        turn, config = self._journal.turn, made.config
        had = await files.files_of(made.attachments) if made.attachments and files.are_read(config.tools) else []
        shields = {name: (tool.input_shields, tool.output_shields) for tool in config.tools for name in names_of(tool)}
        past = await self._past.before(self._context, turn, config.model)
        names = [file.name for file in had]
        has_run = any(run.began_at is not None for run in self._journal.runs.values())
        async with self._place.open_tools(self._bounds, config.tools, had, is_resumed=has_run) as tools:
            told = definitions(config, tools)
            timeout_s = self._bounds.tool_timeout_s
            loop = Loop(
                context=self._context,
                ask_memory=self._place.ask_memory,
                config=config,
                plan=made.plan,
                session_bank=made.session_bank,
                messages=made.messages,
                attachments=made.attachments,
                journal=self._journal,
                withheld=made.withheld,
                stream=self._stream,
                conversation=Conversation(
                    self._context, config, past, turn.request["messages"], made.attachments, names
                ),
                calling=CallContext(self._context, self._journal, tools, told, shields, self._keys, timeout_s),
            )
            await loop.run()
        if self._journal.turn.has_ended:
            self._past.add(self._journal.turn, self._journal.steps)


@dataclass(frozen=True)
class _Made:
    """What a turn's rows say of it."""

    config: AgentConfig
    messages: list[InputMessage]
    attachments: list[Attachment]
    session_bank: str | None
    plan: Plan
    withheld: Withheld
