"""Wire types of the reward scoring API."""

import json
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from stack.api.inference import MAX_MESSAGES
from stack.api.messages import (
    Attachment,
    CompletionMessage,
    Message,
    ToolCall,
    ToolResponseMessage,
    UserMessage,
)
from stack.api.wire import ModelId, Request, Wire, at_most

MAX_DIALOGS = 1_024
# Of all dialogs together. A dialog is read once more with each of its generations.
MAX_GENERATIONS = 2_048
MAX_SCORED_CHARACTERS = 8_000_000
MAX_SCORE = 1e30


class DialogGenerations(Wire):
    """A dialog and answers to it, each of which is scored as the dialog's next message."""

    dialog: Annotated[list[Message], Field(min_length=1), at_most(MAX_MESSAGES)]
    sampled_generations: Annotated[list[Message], at_most(MAX_GENERATIONS)]


def _at_most_generations(value: object) -> object:
    """Refuses dialogs with too many generations together before any of them is looked at."""
    rows = [row.get("sampled_generations") for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    count = sum(len(row) for row in rows if isinstance(row, list))
    if count > MAX_GENERATIONS:
        raise ValueError(f"has {count} generations; allowed: at most {MAX_GENERATIONS}")
    return value


class RewardScoringRequest(Request):
    """Dialogs with generations for a reward model. `threshold` is an addition: generations below it are left out."""

    dialog_generations: Annotated[
        list[DialogGenerations], Field(min_length=1), BeforeValidator(_at_most_generations), at_most(MAX_DIALOGS)
    ]
    model: ModelId
    threshold: Annotated[float, Field(ge=-MAX_SCORE, le=MAX_SCORE)] | None = None

    @model_validator(mode="after")
    def _is_not_too_great(self) -> "RewardScoringRequest":
        total = sum(
            len(one.sampled_generations) * sum(map(characters, one.dialog))
            + sum(map(characters, one.sampled_generations))
            for one in self.dialog_generations
        )
        if total > MAX_SCORED_CHARACTERS:
            raise ValueError(
                f"{total} characters would be read, each dialog once with each of its generations; allowed: at "
                f"most {MAX_SCORED_CHARACTERS}"
            )
        return self


def characters(message: Message) -> int:
    """How many characters a model reads of a message: its contents, and what it says of calls of tools."""
    contents = [message.content, message.context or ""] if isinstance(message, UserMessage) else [message.content]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    read = sum(len(part.content if isinstance(part, Attachment) else part) for part in parts)
    match message:
        case CompletionMessage():
            return read + sum(len(call.call_id) + len(call.tool_name) + _written(call) for call in message.tool_calls)
        case ToolResponseMessage():
            return read + len(message.call_id) + len(message.tool_name)
    return read


def _written(call: ToolCall) -> int:
    """How many characters the arguments of a call have as JSON."""
    try:
        return len(json.dumps(call.arguments, ensure_ascii=False))
    except RecursionError:
        raise ValueError(f"the arguments of the call of {str(call.tool_name)!r} are nested too deeply") from None


class ScoredMessage(Wire):
    message: Message
    score: float


class ScoredDialogGenerations(Wire):
    """A dialog and the generations that were scored, in their order."""

    dialog: list[Message]
    scored_generations: list[ScoredMessage]


class RewardScoringResponse(Wire):
    """All dialogs, in their order, with the generations that pass the threshold: all, if there was none."""

    scored_generations: list[ScoredDialogGenerations]
