"""The events of a turn: what each is called, the stream of a turn that runs, and the same made again from its rows.

An event's id tells its place: `start`, then of each step `<step>.<attempt>.<n>`, of which n = 0 begins it and the
others are its progress, and `<step>.end`; `<step>.approval` where the client is asked before that step; `end`. Whoever
was cut off goes on behind the last id that it has. What an event is of does not change, but progress is kept only for a
time: behind one of a step that has ended comes the end of it, which has all of it, and behind one of an attempt that
was broken off comes the beginning of the attempt after it.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from copy import copy
from typing import Any

from stack.agentic_system.sessions import Event
from stack.errors import BadInput, StackError

# Of one step: further progress is put together, in pieces of so many characters.
MAX_PIECES = 1_000
JOINED = 400
# Of one turn: the progress of steps that have ended is forgotten beyond them, that of the oldest step first.
MAX_KEPT = 5_000
_PLACE = re.compile(r"([1-9]\d{0,8})\.(?:end|approval|\d{1,9}\.\d{1,9})")

Payload = dict[str, Any]


def event(id: str, payload: Payload) -> Event:
    """An event of the type and fields that the payload has, without those that are None."""
    told = {key: value for key, value in payload.items() if value is not None}
    return Event(id, json.dumps({"event": {"payload": told}}, ensure_ascii=False, separators=(",", ":")))


class Stream:
    """The events of one turn, for any number of readers, each of which may come at any time and read at its pace.

    Events can be held back: readers do not see them until they are released, or withdrawn.
    """

    def __init__(self) -> None:
        self._events: list[Event | None] = []  # None for what is not kept
        self._places: dict[str, int] = {}
        self._held_from: int | None = None
        self._kept: dict[int, list[int]] = {}  # where the progress of a step is
        self._kept_count = 0
        self.is_left = False
        self._is_retold = False
        self._is_over = False
        self._error: StackError | None = None
        self._changed = asyncio.Event()

    def put(self, id: str, payload: Payload) -> None:
        """Adds an event, unless it is there already."""
        if id in self._places:
            return
        self._places[id] = len(self._events)
        self._events.append(event(id, payload))
        self._wake()

    def put_progress(self, step: int, id: str, payload: Payload) -> None:
        """An event that may be forgotten once its step has ended."""
        self._kept.setdefault(step, []).append(len(self._events))
        self._kept_count += 1
        if self._kept_count > MAX_KEPT and len(self._kept) > 1:
            self._forget(next(iter(self._kept)))
        self.put(id, payload)

    def retold(self) -> None:
        """All events are there again of what was before: now a reader's last one can be looked for.

        What is held back by then of an attempt that was lost is dropped.
        """
        if self._held_from is not None:
            progress = {at for of_step in self._kept.values() for at in of_step}
            for at in range(self._held_from, len(self._events)):
                if at in progress:
                    self._drop(at)
            self._held_from = None
        self._is_retold = True
        self._wake()

    def hold(self) -> None:
        """Readers see no more than there is by now."""
        if self._held_from is None:
            self._held_from = len(self._events)

    def hold_from(self, id: str) -> None:
        """Readers do not see the event of this id, nor what is behind it."""
        self._held_from = self._places[id]

    def release(self) -> None:
        self._held_from = None
        self._wake()

    def withdraw(self, step: int, id: str, payload: Payload) -> None:
        """Of what is held back, the step's progress is taken out, and the event of this id is another one."""
        assert self._held_from is not None
        for at in [at for at in self._kept.get(step, ()) if at >= self._held_from]:
            self._drop(at)
        self._events[self._places[id]] = event(id, payload)

    def finish(self, error: StackError | None = None) -> None:
        """Nothing more comes; the readers' iterators end, by the error where there is one. The first call counts.

        What is held back then is never seen.
        """
        if not self._is_over:
            self._is_over, self._error = True, error
            self._wake()

    def leave(self, error: StackError | None = None) -> None:
        """Nothing more comes here, though the turn has not ended: whoever asks for its events again asks elsewhere."""
        self.is_left = True
        self.finish(error)

    async def read(self, after: str | None = None) -> AsyncGenerator[Event]:
        """The events behind the one of the id `after`, or all of them, to the turn's end.

        Raises BadInput for an id that is not of this turn, and what the turn failed by.
        """
        if after is not None:
            while after not in self._places and not (self._is_retold or self._is_over):
                await self._changed.wait()
        at = 0 if after is None else self._behind(after)
        while True:
            changed = self._changed
            while at < self._readable:  # which may grow while the reader is at an event
                at += 1
                if (one := self._events[at - 1]) is not None:
                    yield one
            if self._is_over:
                if self._error is not None:
                    raise copy(self._error)  # of each reader its own, as it keeps the reader's frames
                return
            if changed is self._changed:
                await changed.wait()

    @property
    def _readable(self) -> int:
        return len(self._events) if self._held_from is None else self._held_from

    def _behind(self, after: str) -> int:
        if after in self._places:
            return self._places[after] + 1
        place = _PLACE.fullmatch(after)
        if place is not None:
            step = place[1]
            if (end := self._places.get(f"{step}.end")) is not None:
                return end
            begun = [at for name, at in self._places.items() if name.startswith(f"{step}.") and name.endswith(".0")]
            if begun:
                return begun[-1]
            # It was begun by an attempt that is lost, and is not begun again yet.
            if (before := self._places.get(_end_before(int(step)))) is not None:
                return before + 1
        raise BadInput(f"the turn has no event {after[:100]!r}; allowed: the id of one that was sent", param="after")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _forget(self, step: int) -> None:
        for at in self._kept[step]:
            self._drop(at)
        self._kept_count -= len(self._kept.pop(step))

    def _drop(self, at: int) -> None:
        if (dropped := self._events[at]) is not None:
            del self._places[dropped.id]
            self._events[at] = None


def _end_before(step: int) -> str:
    return "start" if step == 1 else f"{step - 1}.end"


class Progress:
    """The events of one attempt at a step, from its beginning to its end.

    Behind MAX_PIECES of them, texts are put together: what a step can have of events is bounded.
    """

    def __init__(self, stream: Stream, step: int, attempt: int, step_type: str, step_id: str) -> None:
        self._stream = stream
        self._step = step
        self._attempt = attempt
        self._fields: Payload = {"step_type": step_type, "step_id": step_id}
        self._count = 0
        self._joined: list[str] = []
        self._joined_size = 0
        self._joined_of: tuple[str, str | None] | None = None

    def begin(self, metadata: Payload | None = None) -> None:
        self._stream.put(
            f"{self._step}.{self._attempt}.0", {"event_type": "step_start", **self._fields, "metadata": metadata}
        )

    def model_text(self, text: str) -> None:
        self._text("model_response_text_delta", None, text)

    def tool_text(self, call_id: str, text: str) -> None:
        self._text("tool_response_text_delta", call_id, text)

    def call(self, content: str | Payload, status: str) -> None:
        """New text of a call, as the model writes it, or the call itself."""
        if status == "in_progress" and isinstance(content, str):
            self._text("tool_call_delta", None, content)
            return
        self.flush()
        self._put({"tool_call_delta": {"content": content, "parse_status": status}})

    def end(self, details: Payload) -> None:
        self.flush()
        self._stream.put(f"{self._step}.end", completed(details))

    def flush(self) -> None:
        """Sends what was put together."""
        if self._joined_of is not None:
            (field, call_id), text = self._joined_of, "".join(self._joined)
            self._joined, self._joined_size, self._joined_of = [], 0, None
            self._put_text(field, call_id, text)

    def _text(self, field: str, call_id: str | None, text: str) -> None:
        if not text:
            return
        if self._count < MAX_PIECES:
            self._put_text(field, call_id, text)
            return
        if self._joined_of is not None and self._joined_of != (field, call_id):
            self.flush()
        self._joined_of = (field, call_id)
        self._joined.append(text)
        self._joined_size += len(text)
        if self._joined_size >= JOINED:
            self.flush()

    def _put_text(self, field: str, call_id: str | None, text: str) -> None:
        if field == "tool_call_delta":
            self._put({field: {"content": text, "parse_status": "in_progress"}})
        else:
            self._put({field: text, "call_id": call_id})

    def _put(self, fields: Payload) -> None:
        self._count += 1
        self._stream.put_progress(
            self._step,
            f"{self._step}.{self._attempt}.{self._count}",
            {"event_type": "step_progress", **self._fields, **fields},
        )


def started(turn_id: str) -> Payload:
    return {"event_type": "turn_start", "turn_id": turn_id}


def completed(details: Payload) -> Payload:
    """Of a step, whose details are those of its wire type."""
    return {"event_type": "step_complete", "step_type": details["step_type"], "step_details": details}


def awaiting(turn_id: str, calls: list[Payload]) -> Payload:
    return {"event_type": "turn_awaiting_approval", "turn_id": turn_id, "tool_calls": calls}
