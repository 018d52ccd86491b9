"""Wire types of the batch inference API: many chats or texts in one request, each of which is answered or fails alone.

What is wrong with one row does not refuse the others: such a row is read as a RefusedRow.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from stack.api.datasets import DatasetReference
from stack.api.inference import (
    MAX_MESSAGES,
    LogProbConfig,
    SamplingParams,
    TokenLogProbs,
    ToolChoice,
    ToolDefinition,
    ToolPromptFormat,
)
from stack.api.jobs import ArtifactFile, JobEngine, JobEntry, JobState, MakingJobUuid, Priority
from stack.api.messages import Attachment, CompletionMessage, Content, Message, UserMessage
from stack.api.wire import ModelId, Request, Wire, at_most, explain

MAX_ROWS = 256
# Of all rows together.
MAX_BATCH_MESSAGES = 10_000
MAX_BATCH_CHARACTERS = 16_000_000
MAX_BATCH_ATTACHMENTS = 32
MAX_FAILED_ROWS = 1_000_000


@dataclass(frozen=True)
class RefusedRow:
    """A row that is not of its shape: what is wrong with it, and where in it."""

    problem: str
    place: str


def _alone(value: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        place, description = explain(error.errors()[0])
        return RefusedRow(f"{place}: {description}" if place else description, place)


_Row = WrapValidator(_alone)
ChatRow = Annotated[Annotated[list[Message], FailFast(), Field(min_length=1), at_most(MAX_MESSAGES)], _Row]
TextRow = Annotated[Content, _Row]


def _at_most_messages(rows: Any) -> Any:
    """Refuses rows with too many messages together before any of them is looked at."""
    count = sum(len(row) for row in rows if isinstance(row, list)) if isinstance(rows, list) else 0
    if count > MAX_BATCH_MESSAGES:
        raise ValueError(f"has {count} messages; allowed: at most {MAX_BATCH_MESSAGES}")
    return rows


def _require_size(contents: Iterable[Any]) -> None:
    """Raises ValueError for contents that are too great together. Those of refused rows do not count."""
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    attached = [part for part in parts if isinstance(part, Attachment)]
    if len(attached) > MAX_BATCH_ATTACHMENTS:
        raise ValueError(f"the rows hold {len(attached)} attachments; allowed: at most {MAX_BATCH_ATTACHMENTS}")
    texts = [text for one in attached for text in (one.content if isinstance(one.content, list) else [one.content])]
    characters = sum(len(text) for text in [*texts, *parts] if isinstance(text, str))
    if characters > MAX_BATCH_CHARACTERS:
        raise ValueError(f"the rows hold {characters} characters; allowed: at most {MAX_BATCH_CHARACTERS}")


class BatchChatCompletionRequest(Request):
    """Conversations, each with its own answer; all else is the same for all of them."""

    model: ModelId
    messages_batch: Annotated[list[ChatRow], Field(min_length=1), BeforeValidator(_at_most_messages), at_most(MAX_ROWS)]
    sampling_params: SamplingParams = SamplingParams()
    tools: Annotated[list[ToolDefinition], at_most(128)] = []
    tool_choice: ToolChoice = ToolChoice.auto
    tool_prompt_format: ToolPromptFormat = ToolPromptFormat.json
    logprobs: LogProbConfig | None = None

    @model_validator(mode="after")
    def _is_not_too_great(self) -> "BatchChatCompletionRequest":
        messages = [message for row in self.messages_batch if isinstance(row, list) for message in row]
        contexts = [message.context for message in messages if isinstance(message, UserMessage)]
        _require_size([*(message.content for message in messages), *contexts])
        return self


class BatchCompletionRequest(Request):
    """Texts, each with its own continuation; all else is the same for all of them."""

    model: ModelId
    content_batch: Annotated[list[TextRow], Field(min_length=1), at_most(MAX_ROWS)]
    sampling_params: SamplingParams = SamplingParams()
    logprobs: LogProbConfig | None = None

    @model_validator(mode="after")
    def _is_not_too_great(self) -> "BatchCompletionRequest":
        _require_size(self.content_batch)
        return self


class RowErrorDetails(Wire):
    """As in the error envelope."""

    code: str
    message: str
    type: str
    param: str | None = None


class RowError(Wire):
    """Why a row has no answer. `index` is its place in the batch, from 0."""

    index: int
    error: RowErrorDetails


class BatchCompletionResponse(Wire):
    """The answers in the order of the rows.

    A row that failed has an empty message with the stop reason `out_of_tokens` in its place, and is in `errors`.
    `logprobs_batch` has those of each row, if they were asked for, and null for a row that failed.
    """

    completion_message_batch: list[CompletionMessage]
    errors: list[RowError] = []
    logprobs_batch: list[list[TokenLogProbs] | None] | None = None


class BatchChatCompletionResponse(BatchCompletionResponse):
    """The same for conversations."""


class BatchKind(StrEnum):
    """What a job asks of each row: an answer to a dialog, a continuation of a text, or the vector of a text."""

    chat_completion = "chat_completion"
    completion = "completion"
    embeddings = "embeddings"


_CHATS = (BatchKind.chat_completion,)
_ANSWERS = (BatchKind.chat_completion, BatchKind.completion)
# With which kinds some fields can be used.
_KINDS_OF = {
    "sampling_params": _ANSWERS,
    "tools": _CHATS,
    "tool_choice": _CHATS,
    "tool_prompt_format": _CHATS,
    "logprobs": _ANSWERS,
    "truncate": (BatchKind.embeddings,),
}


class BatchInferenceJobRequest(Request):
    """A model's answers to all rows of a data set.

    Chats need a column of type dialog, or `prompt` of type text; completions and embeddings `text` or `prompt` of type
    text. Sampling, tools and `logprobs` are as in a request of the kind. Ids of rows stand in a column `id`, of type
    text or number; without it, they are the numbers of the rows. The answers become the data set `JOB_UUID.answers`,
    what failed the data set `JOB_UUID.errors`. More than `max_failed_rows` of them fail the job. With `truncate`, texts
    over an embedding model's length are cut. With `engine: own` the model answers by an engine that the job starts for
    itself, and needs no replica.
    """

    job_uuid: MakingJobUuid
    kind: BatchKind
    model: ModelId
    dataset: DatasetReference
    sampling_params: SamplingParams = SamplingParams()
    tools: Annotated[list[ToolDefinition], at_most(128)] = []
    tool_choice: ToolChoice = ToolChoice.auto
    tool_prompt_format: ToolPromptFormat = ToolPromptFormat.json
    logprobs: LogProbConfig | None = None
    truncate: bool = False
    engine: JobEngine = JobEngine.serving
    max_failed_rows: Annotated[int, Field(ge=0, le=MAX_FAILED_ROWS)] = 1_000
    priority: Priority = 0

    @field_validator("engine")
    @classmethod
    def _engine_makes_text(cls, engine: JobEngine, others: ValidationInfo) -> JobEngine:
        if engine == JobEngine.own and others.data.get("kind") == BatchKind.embeddings:
            raise ValueError(
                "is 'own', which is for models that make text; allowed with the kind 'embeddings': 'serving'"
            )
        return engine

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for name, kinds in _KINDS_OF.items():
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and self.kind not in kinds:
                allowed = ", ".join(repr(kind.value) for kind in kinds)
                raise ValueError(f"{name} cannot be used with the kind {self.kind.value!r}; allowed: {allowed}")
        if self.tool_choice == ToolChoice.required and not self.tools:
            raise ValueError("tool_choice is 'required', but there are no tools")
        return self


class BatchInferenceJob(Wire):
    job_uuid: str


class BatchInferenceJobEntry(JobEntry):
    """A batch in a list."""


class BatchInferenceJobStatusResponse(JobState):
    """`metrics` holds `rows`, `failed`, `prompt_tokens`, `completion_tokens` and `seconds`: for how long the job has
    worked, in all its attempts."""


class BatchInferenceJobArtifactsResponse(Wire):
    """`datasets` are the ids of those that the job has made: `answers`, and `errors` where rows have failed."""

    job_uuid: str
    path: str | None
    files: list[ArtifactFile]
    datasets: dict[str, str]
