"""Wire types of the synthetic data generation API.

The specification has `dialogs`, `filtering_function` and `model`. All else is added, and optional.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stack.api.batch_inference import MAX_FAILED_ROWS, RowError
from stack.api.datasets import DatasetReference
from stack.api.inference import MAX_MESSAGES, SamplingParams, SamplingStrategy
from stack.api.jobs import (
    ArtifactFile,
    JobEngine,
    JobEntry,
    JobState,
    JsonObject,
    MadeDatasetId,
    MakingJobUuid,
    Priority,
)
from stack.api.memory_banks import BankId
from stack.api.messages import Attachment, CompletionMessage, Message, SystemMessage, UserMessage
from stack.api.reward_scoring import (
    MAX_GENERATIONS,
    MAX_SCORE,
    MAX_SCORED_CHARACTERS,
    ScoredDialogGenerations,
    characters,
)
from stack.api.wire import ModelId, Request, Wire, at_most, without_nul

# Of one request that is answered at once.
MAX_DIALOGS = 256
MAX_DIALOG_MESSAGES = 10_000
# Of one dialog.
MAX_SAMPLES = 64
MAX_SEED_PROMPTS = 1_000
MAX_GROWN_PROMPTS = 20_000


class FilteringFunction(StrEnum):
    """Which generations are kept, by their scores: stack/filtering.py has the formulas."""

    none = "none"
    random = "random"
    top_k = "top_k"
    top_p = "top_p"
    top_k_top_p = "top_k_top_p"
    sigmoid = "sigmoid"


class GenerationSettings(Request):
    """How generations are sampled, scored and filtered.

    `num_generations` are sampled for each dialog by `model` (the config's first model, if none is named) and scored by
    `reward_model` (the config's first). `filter_k` and `filter_p` are the k and the p of the filtering functions,
    `threshold` the lowest score that passes, or the middle of `sigmoid`. The same `seed` draws the same again.
    """

    filtering_function: FilteringFunction
    model: ModelId | None = None
    reward_model: ModelId | None = None
    num_generations: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 4
    sampling_params: SamplingParams = SamplingParams(
        strategy=SamplingStrategy.top_p, temperature=1.0, top_p=0.95, max_tokens=512
    )
    filter_k: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    filter_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    threshold: Annotated[float, Field(ge=-MAX_SCORE, le=MAX_SCORE)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.num_generations > 1 and (why := _why_all_alike(self.sampling_params)) is not None:
            raise ValueError(
                f"num_generations is {self.num_generations}, but {why} gives the same each time; allowed: "
                "num_generations 1, or the strategies 'top_p' and 'top_k', a temperature above 0, a top_k above 1"
            )
        return self


def _why_all_alike(sampling: SamplingParams) -> str | None:
    """What of these parameters leaves a model no choice, if anything does."""
    if sampling.strategy == SamplingStrategy.greedy:
        return "the strategy 'greedy'"
    if sampling.temperature == 0:
        return "the temperature 0"
    if sampling.strategy == SamplingStrategy.top_k and sampling.top_k == 1:
        return "the top_k 1"
    return None


def _shape_of(value: Any) -> str:
    """The tag of the dialogs: told by the first one."""
    nested = isinstance(value, list) and bool(value) and isinstance(value[0], list)
    return "(dialogs)" if nested else "(messages)"


def _few_messages(value: Any) -> Any:
    """Refuses dialogs with too many messages together before any of them is looked at."""
    count = sum(len(one) for one in value if isinstance(one, list)) if isinstance(value, list) else 0
    if count > MAX_DIALOG_MESSAGES:
        raise ValueError(f"has {count} messages; allowed: at most {MAX_DIALOG_MESSAGES}")
    return value


Dialog = Annotated[list[Message], Field(min_length=1), at_most(MAX_MESSAGES)]
Dialogs = Annotated[
    Annotated[list[Message], Field(min_length=1), at_most(MAX_DIALOG_MESSAGES), Tag("(messages)")]
    | Annotated[list[Dialog], Field(min_length=1), at_most(MAX_DIALOGS), Tag("(dialogs)")],
    Discriminator(_shape_of),
    BeforeValidator(_few_messages),
]


class SyntheticDataGenerationRequest(GenerationSettings):
    """Dialogs to answer, each of which ends with what is to be answered.

    The specification's `dialogs` is one list of messages, which `split` cuts into dialogs; a list of lists is taken as
    it is.
    """

    dialogs: Dialogs

    @property
    def each(self) -> list[list[Message]]:
        """The dialogs one by one."""
        first = self.dialogs[0]
        return self.dialogs if isinstance(first, list) else split(self.dialogs)  # type: ignore[arg-type,return-value]

    @model_validator(mode="after")
    def _is_not_too_great(self) -> Self:
        dialogs = self.each
        if len(dialogs) > MAX_DIALOGS:
            raise ValueError(f"there are {len(dialogs)} dialogs; allowed: at most {MAX_DIALOGS}")
        for index, dialog in enumerate(dialogs):
            if len(dialog) > MAX_MESSAGES:
                raise ValueError(
                    f"dialogs: the dialog {index} has {len(dialog)} messages; allowed: at most {MAX_MESSAGES}"
                )
            if any(map(_has_attachment, dialog)):
                raise ValueError(
                    f"dialogs: the dialog {index} has an attachment, which reward models do not read; allowed: text"
                )
            if isinstance(dialog[-1], CompletionMessage | SystemMessage):
                raise ValueError(
                    f"dialogs: the dialog {index} ends with a message of the role {dialog[-1].role!r}; allowed: user, "
                    "ipython, as it is to be answered"
                )
        total = len(dialogs) * self.num_generations
        if total > MAX_GENERATIONS:
            raise ValueError(
                f"{len(dialogs)} dialogs with num_generations {self.num_generations} make {total} generations; "
                f"allowed: at most {MAX_GENERATIONS}. /synthetic_data_generation/jobs has no such bound"
            )
        read = self.num_generations * sum(characters(message) for dialog in dialogs for message in dialog)
        if read > MAX_SCORED_CHARACTERS:
            raise ValueError(
                f"{read} characters would be read, each dialog once with each of its generations; allowed: at most "
                f"{MAX_SCORED_CHARACTERS}"
            )
        return self


def _has_attachment(message: Message) -> bool:
    contents = [message.content, message.context or ""] if isinstance(message, UserMessage) else [message.content]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    return any(isinstance(part, Attachment) for part in parts)


def split(messages: Sequence[Message]) -> list[list[Message]]:
    """A flat list of messages as dialogs: one ends before a system message, and before a user's message that follows
    another message to be answered.

    So several user messages are several dialogs, and an answer of the assistant belongs to the dialog before it.
    """
    dialogs: list[list[Message]] = []
    for message in messages:
        last = dialogs[-1][-1].role if dialogs else None
        goes_on = message.role != "system" and (message.role != "user" or last in ("system", "assistant"))
        if dialogs and goes_on:
            dialogs[-1].append(message)
        else:
            dialogs.append([message])
    return dialogs


class SyntheticDataGenerationResponse(Wire):
    """The dialogs with the generations that are kept; a dialog that keeps none, or failed, has an empty list.

    `statistics` has `dialogs`, `generated`, `kept`, `failed` (dialogs), `mean_score`, `score_histogram` (`edges`, and
    one fewer `counts`), `prompt_tokens`, `completion_tokens`, `seconds`, and the `model` and `reward_model` that were
    asked. `errors`, an addition, says why dialogs failed, by their index.
    """

    synthetic_data: list[ScoredDialogGenerations]
    statistics: JsonObject | None = None
    errors: list[RowError] = []


class PromptSource(StrEnum):
    """Where the prompts of a job come from.

    `dataset` are the rows of a data set. `self_instruct` grows them from `seed_prompts` by the model. `documents` are
    the texts of a data set, or the documents of a memory bank, about which the model asks questions and answers them.
    """

    dataset = "dataset"
    self_instruct = "self_instruct"
    documents = "documents"


class SyntheticOutput(StrEnum):
    """What a job makes: examples for supervised fine-tuning, pairs for preference optimization, or all that is kept."""

    sft = "sft"
    preferences = "preferences"
    scored = "scored"


# Where the prompts of each source stand: in one of these fields.
_FIELDS_OF = {
    PromptSource.dataset: ("dataset",),
    PromptSource.self_instruct: ("seed_prompts",),
    PromptSource.documents: ("dataset", "bank_id"),
}
SeedPrompt = Annotated[str, Field(min_length=1, max_length=10_000), AfterValidator(without_nul)]


class SyntheticDataJobRequest(GenerationSettings):
    """A generation of any size, which makes a data set.

    `dataset` has the prompts (a column of type dialog, or `prompt` of type text) or the documents (`text` of type
    text), with ids in a column `id`, if it has one; `bank_id` is the memory bank whose documents are read instead.
    `self_instruct` grows `seed_prompts` to `num_prompts` prompts, of which none has more than `max_similarity`
    (stack/near_duplicates.py) in common with another. Documents are read in passages of up to `passage_characters`.
    Pairs need a `min_margin` between their scores. The data set is called `output_dataset`, or as the job. A row that
    fails is told; more than `max_failed_rows` of them fail the job. With `engine: own` the model answers by an engine
    that the job starts for itself, and needs no replica; the reward model is asked where it serves.
    """

    job_uuid: MakingJobUuid
    source: PromptSource = PromptSource.dataset
    dataset: DatasetReference | None = None
    bank_id: BankId | None = None
    seed_prompts: Annotated[list[SeedPrompt], Field(min_length=1), at_most(MAX_SEED_PROMPTS)] | None = None
    num_prompts: Annotated[int, Field(ge=1, le=MAX_GROWN_PROMPTS)] = 100
    max_similarity: Annotated[float, Field(ge=0.1, lt=1)] = 0.7
    passage_characters: Annotated[int, Field(ge=200, le=20_000)] = 2_000
    output: SyntheticOutput = SyntheticOutput.sft
    min_margin: Annotated[float, Field(ge=0, le=MAX_SCORE)] = 0.0
    output_dataset: MadeDatasetId | None = None
    engine: JobEngine = JobEngine.serving
    max_failed_rows: Annotated[int, Field(ge=0, le=MAX_FAILED_ROWS)] = 100
    priority: Priority = 0

    @field_validator("engine")
    @classmethod
    def _engine_is_there(cls, engine: JobEngine, others: ValidationInfo) -> JobEngine:
        if engine == JobEngine.own and others.data.get("source") == PromptSource.self_instruct:
            raise ValueError(
                "is 'own', but prompts are grown before the job has an engine, by the model that serves; allowed with "
                "the source 'self_instruct': 'serving'"
            )
        return engine

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> Self:
        fields = _FIELDS_OF[self.source]
        given = [name for names in _FIELDS_OF.values() for name in names if getattr(self, name) is not None]
        if not any(name in fields for name in given):
            raise ValueError(f"{' or '.join(fields)} is required with the source {self.source.value!r}")
        for name in given:
            if name not in fields:
                raise ValueError(f"{name} cannot be used with the source {self.source.value!r}; leave it out")
        if len(set(given)) > 1:
            raise ValueError(f"there are {' and '.join(fields)}; allowed: one of them")
        return self

    @model_validator(mode="after")
    def _output_can_be_made(self) -> Self:
        if self.output != SyntheticOutput.preferences:
            return self
        if self.source == PromptSource.documents:
            raise ValueError(
                "output is 'preferences', but each question about a document has one answer; allowed with the source "
                "'documents': 'sft', 'scored'"
            )
        if self.num_generations < 2:
            raise ValueError("output is 'preferences', which needs num_generations of at least 2, not 1")
        return self


class SyntheticDataJob(Wire):
    job_uuid: str


class SyntheticDataJobEntry(JobEntry):
    """A generation in a list."""


class SyntheticDataJobStatusResponse(JobState):
    """`metrics` holds the counts `prompts`, `generated`, `rows`, `failed`, of what was rejected by its reason
    (`rejected_…`), and `mean_score`, `prompt_tokens`, `completion_tokens`, and `seconds`: for how long the job has
    worked, in all its attempts."""


class SyntheticDataJobArtifactsResponse(Wire):
    """`datasets` are those that the job has made, by what they hold: their ids. The files tell what was rejected."""

    job_uuid: str
    path: str | None
    files: list[ArtifactFile]
    datasets: dict[str, str]
