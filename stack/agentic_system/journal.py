"""The journal of one turn that is run here: its rows, and a copy of them in memory, which is read in their place.

Nothing is begun before the row that says so is committed, and nothing is told to anybody before the row is that it is
true. What is to be written is gathered until the next `commit`: the end of a step is one transaction with the beginning
of the step after it.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from stack.api.agentic_system import MAX_ATTACHMENTS, StepType, TurnState
from stack.api.messages import MAX_ATTACHMENT_CHARACTERS
from stack.errors import StackError
from stack.store import Store, now
from stack.store.turns import ASKED, Step, ToolRun, Turn
from stack.store.turns import Journal as Transaction

# What the tools of a turn can give to the user, all together: whoever runs the turn has it in memory.
MAX_FILES = MAX_ATTACHMENTS
MAX_FILES_CHARACTERS = MAX_ATTACHMENT_CHARACTERS

NOT_BEGUN = "The call was not run: the turn was cancelled."

Entry = Callable[[Transaction], None]


class JournalLost(Exception):
    """The journal could not be written, and not by the database's fault. The turn is in its rows as it was before."""


class ToEnd(Exception):
    """The turn's row says that it is to be cancelled."""


class Journal:
    """`turn`, `steps` and `runs` (by call id) are as they are in the rows, with what waits to be written."""

    def __init__(self, store: Store, turn: Turn) -> None:
        self._store = store
        self.turn = turn
        self.steps: list[Step] = []
        self.runs: dict[str, ToolRun] = {}
        self._entries: list[Entry] = []
        self._then: list[Callable[[], None]] = []
        self._committing = asyncio.Lock()
        self._failed_by: Exception | None = None
        self._files = self._files_characters = 0
        self._beginning: list[str] = []  # calls whose beginning waits to be written
        self.is_to_end = turn.cancelled_at is not None

    def load(self) -> None:
        """Reads what others have written who had the turn before. It blocks."""
        if self.turn.epoch > 1:
            self.steps = self._store.turns.steps_of([self.turn.id])
            self.runs = {run.call_id: run for run in self._store.turns.runs_of(self.turn.id)}
            responses = [run.response for run in self.runs.values() if run.response is not None]
            for one in (one for response in responses for one in response["attachments"]):
                self.has_room(length(one["content"]))

    @property
    def takes(self) -> int:
        """How often the turn was taken since a step of it has ended."""
        ended = next((step for step in reversed(self.steps) if step.has_ended), None)
        return self.turn.epoch - (ended.about.get("epoch", 0) if ended is not None else 0)

    def has_room(self, characters: int) -> bool:
        """Whether there is room for one more file of so many characters that a tool gives. Then it is taken."""
        if self._files == MAX_FILES or self._files_characters + characters > MAX_FILES_CHARACTERS:
            return False
        self._files += 1
        self._files_characters += characters
        return True

    def begin_step(self, kind: StepType, about: dict[str, Any]) -> Step:
        """The next step begins, or the last one again where it has not ended."""
        if self.steps and not self.steps[-1].has_ended:
            step = replace(self.steps[-1], attempt=self.steps[-1].attempt + 1, started_at=now())
            self._entries.append(lambda rows: rows.save_step(step))
            self.steps[-1] = step
        else:
            number = len(self.steps) + 1
            step = Step(uuid.uuid4().hex, self.turn.id, number, kind.value, about, 1, None, now(), None)
            self._entries.append(lambda rows: rows.add_step(step))
            self.steps.append(step)
        return step

    def end_step(self, details: dict[str, Any], about: dict[str, Any]) -> Step:
        """The last step has ended. `about` is what is known of it beside the details, which are shown to clients."""
        about = self.steps[-1].about | about | {"epoch": self.turn.epoch}
        step = replace(self.steps[-1], details=details, about=about, completed_at=now())
        self._entries.append(lambda rows: rows.save_step(step))
        self.steps[-1] = step
        return step

    def change_step(self, number: int, details: dict[str, Any]) -> Step:
        """A step that has ended gets other details: a shield has withdrawn what it said."""
        step = replace(self.steps[number - 1], details=details)
        self._entries.append(lambda rows: rows.save_step(step))
        self.steps[number - 1] = step
        return step

    def begin_runs(self, call_ids: Sequence[str]) -> None:
        """Calls of the last step begin."""
        step, time = self.steps[-1], now()
        self._entries.append(lambda rows: rows.begin_runs(step, call_ids))
        self._beginning += call_ids
        for call_id in call_ids:
            known = self.runs.get(call_id) or ToolRun(step.id, call_id, None, None, None, None)
            self.runs[call_id] = replace(known, began_at=time)

    def end_run(self, call_id: str, response: dict[str, Any]) -> None:
        """A call of the last step has ended; `response` is what is known of that."""
        step = self.steps[-1]
        self._entries.append(lambda rows: rows.end_run(step, call_id, response))
        self.runs[call_id] = replace(self.runs[call_id], ended_at=now(), response=response)

    def ask_approval(self, call_ids: Sequence[str]) -> None:
        """The turn stops until the client has said of these calls of the last step whether they are run."""
        step = self.steps[-1]

        def write(rows: Transaction) -> None:
            self.turn = rows.ask_approval(step, call_ids)

        self._entries.append(write)
        for call_id in call_ids:
            self.runs[call_id] = ToolRun(step.id, call_id, None, None, None, ASKED)

    def complete(self, output_message: dict[str, Any], attachments: Sequence[dict[str, Any]]) -> None:
        def write(rows: Transaction) -> None:
            self.turn = rows.complete(output_message, attachments)

        self._entries.append(write)

    def fail(self, error: dict[str, Any]) -> None:
        """What waits to be written is written as well."""

        def write(rows: Transaction) -> None:
            self.turn = rows.fail(error)

        self._entries.append(write)

    def cancel(self) -> None:
        def write(rows: Transaction) -> None:
            self.turn = rows.cancelled()

        self._entries.append(write)

    def then(self, tell: Callable[[], None]) -> None:
        """What is done once all that waits now is written."""
        self._then.append(tell)

    async def commit(self) -> None:
        """Writes all that waits, in one transaction, even if it is cancelled meanwhile.

        What waits while another commit is under way is one transaction after it. Raises Conflict with the code
        "superseded" where another owner has taken the turn, or it is gone, and SQLAlchemyError or JournalLost where it
        cannot be written; then nothing can be written any more. Raises ToEnd, with all of it written, where the turn is
        to be cancelled: whoever cancels it may not have reached whoever runs it.
        """
        async with self._committing:
            if self._failed_by is not None:
                raise self._failed_by
            entries, self._entries = self._entries, []
            then, self._then = self._then, []
            beginning, self._beginning = self._beginning, []
            cancelled = bool(entries) and await self._written(entries)
            for tell in then:
                tell()
            if cancelled:
                raise asyncio.CancelledError
            if self.is_to_end and self.turn.state == TurnState.running:
                for call_id in beginning:
                    self.end_run(call_id, {"content": NOT_BEGUN, "attachments": []})
                raise ToEnd

    async def _written(self, entries: Sequence[Entry]) -> bool:
        """Writes. What that fails by is raised by every commit from then on: what is in memory is ahead of the rows.

        Returns whether it was cancelled meanwhile.
        """
        task = asyncio.ensure_future(asyncio.to_thread(self._write, entries))
        cancelled = await _wait(task)
        error = task.exception()
        if error is not None:
            self._failed_by = JournalLost(f"{type(error).__name__}: {error}")
            if isinstance(error, StackError | SQLAlchemyError):
                self._failed_by = error
            raise self._failed_by from (None if self._failed_by is error else error)
        return cancelled

    def _write(self, entries: Sequence[Entry]) -> None:
        with self._store.turns.journal(self.turn) as rows:
            for entry in entries:
                entry(rows)
            self.is_to_end = rows.is_to_end


def length(content: str | Sequence[str]) -> int:
    """How many characters an attachment has."""
    return len(content) if isinstance(content, str) else sum(map(len, content))


async def _wait(task: "asyncio.Future[None]") -> bool:
    """Waits for a task, which is not cancelled with the wait: what it does would be done later, and unseen.

    Returns whether the wait was cancelled.
    """
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    return cancelled
