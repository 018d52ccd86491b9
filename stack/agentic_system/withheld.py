"""An answer that a shield has to let pass: nobody sees it before, and where it does not pass it, nobody at all.

The answer stands in its step's row before it is judged, so that it is judged again after a crash, and not asked for.
"""

from stack.agentic_system.events import Stream, completed
from stack.agentic_system.journal import Journal
from stack.agentic_system.plan import Plan, Shield, answer_of, next_step, violation
from stack.agentic_system.replay import details_of
from stack.api.agentic_system import StepType

UNJUDGED = "[This answer was not judged, and is not shown.]"


class Withheld:
    """What is held back of one turn's events."""

    def __init__(self, plan: Plan, journal: Journal, stream: Stream) -> None:
        self._plan = plan
        self._journal = journal
        self._stream = stream

    def begin(self) -> None:
        """From now on, events are held back: an answer comes."""
        if self._plan.withholds:
            self._stream.hold()

    def again(self) -> None:
        """Of a turn that was run before, and whose events were retold just now, the answer is held back."""
        if self._is_unjudged():
            self._stream.hold_from(f"{answer_of(self._journal.steps).number}.end")

    def end(self) -> None:
        """With the next commit the answer is shown, unless the last step has found that it must not be."""
        steps = self._journal.steps
        if steps and steps[-1].has_ended and steps[-1].about.get("side") == "output" and (why := violation(steps[-1])):
            self._withdraw(why["content"])
        self._journal.then(self._stream.release)

    def give_up(self) -> None:
        """The turn ends otherwise than it should: what is not judged by then is not shown."""
        if self._is_unjudged():
            self._withdraw(UNJUDGED)
            self._journal.then(self._stream.release)

    def _is_unjudged(self) -> bool:
        """Whether the last answer awaits what a shield says of it."""
        if not self._plan.withholds or not any(
            step.kind == StepType.inference and step.has_ended for step in self._journal.steps
        ):
            return False
        todo = next_step(self._plan, self._journal.steps, self._journal.runs)
        return isinstance(todo, Shield) and todo.side == "output"

    def _withdraw(self, text: str) -> None:
        answer = answer_of(self._journal.steps)
        assert answer.details is not None
        message = answer.details["model_response"] | {"content": text, "tool_calls": []}
        step = self._journal.change_step(answer.number, answer.details | {"model_response": message})
        place = f"{step.number}.end"
        self._journal.then(lambda: self._stream.withdraw(step.number, place, completed(details_of(step))))
