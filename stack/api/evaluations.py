"""Wire types of the evaluation API."""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from stack.api.batch_inference import MAX_FAILED_ROWS
from stack.api.datasets import DatasetReference
from stack.api.inference import SamplingParams
from stack.api.jobs import ArtifactFile, JobEngine, JobEntry, JobState, Priority
from stack.api.wire import Id, ModelId, Request, Wire, at_most, without_nul

Checkpoint = Annotated[str, Field(min_length=1, max_length=4_096), AfterValidator(without_nul)]
TaskName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
MAX_CHANGED = 100
# lm-eval holds all that is asked of a task in memory, with what is answered. Most tasks have fewer than DEFAULT_LIMIT
# examples.
MAX_LIMIT = 100_000
DEFAULT_LIMIT = 20_000


class QuestionAnsweringMetric(StrEnum):
    """Exact match and token F1 after SQuAD's normalisation (Rajpurkar et al. 2016, arXiv 1606.05250)."""

    em = "em"
    f1 = "f1"


class SummarizationMetric(StrEnum):
    """ROUGE as rouge-score computes it, BLEU as sacrebleu does: see jobs/scores.py."""

    rouge = "rouge"
    bleu = "bleu"


class TextGenerationMetric(StrEnum):
    """Those of summarization, and the perplexity of the references, given their prompts."""

    perplexity = "perplexity"
    rouge = "rouge"
    bleu = "bleu"


class JudgedMetric(StrEnum):
    """How a judge rates an answer from 1 to 5, and how often it prefers it to another one.

    The two are shown in both orders, in each of which the answer wins (1), loses (0) or ties (0.5). `win_rate` is the
    mean of that; `consistent` is how often both orders say the same, so that the place does not decide.
    """

    rating = "rating"
    win_rate = "win_rate"


class FunctionCallingMetric(StrEnum):
    """Whether all calls are the expected ones, by their syntax, as BFCL compares them (AST match)."""

    ast = "ast"


class EvaluationRequest(Request):
    """What every evaluation asks of a model and compares with references.

    `checkpoint` is the id of a served model, or the training that made one: by its job_uuid, or by the address of the
    artifact that it made. An example that gets no answer has failed and has no score; more than `max_failed_rows` of
    them fail the evaluation, and so it is where all have. With `engine: own` the checkpoint's model answers by an
    engine that the job starts for itself, and needs no replica.
    """

    task: ClassVar[str]
    job_uuid: Id
    dataset: DatasetReference
    checkpoint: Checkpoint
    sampling_params: SamplingParams
    engine: JobEngine = JobEngine.serving
    max_failed_rows: Annotated[int, Field(ge=0, le=MAX_FAILED_ROWS)] = 100
    priority: Priority = 0


class EvaluateQuestionAnsweringRequest(EvaluationRequest):
    task = "question_answering"
    metrics: Annotated[list[QuestionAnsweringMetric], Field(min_length=1), at_most(2)]


class EvaluateSummarizationRequest(EvaluationRequest):
    task = "summarization"
    metrics: Annotated[list[SummarizationMetric], Field(min_length=1), at_most(2)]


class EvaluateTextGenerationRequest(EvaluationRequest):
    task = "text_generation"
    metrics: Annotated[list[TextGenerationMetric], Field(min_length=1), at_most(3)]


class EvaluateJudgedRequest(EvaluationRequest):
    """An addition to the specification: answers are judged by a served chat model, `judge`, that is told a `rubric`.

    For `win_rate` they are compared with those of the model that `opponent` means, as `checkpoint` does, asked the
    same; without one with the answers in the data set.
    """

    task = "judged"
    metrics: Annotated[list[JudgedMetric], Field(min_length=1), at_most(2)]
    judge: ModelId
    rubric: Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(without_nul)]
    opponent: Checkpoint | None = None


class EvaluateFunctionCallingRequest(EvaluationRequest):
    """An addition to the specification: whether a model calls the right functions, on data in BFCL's format.

    The data set has the columns `question`, `function` and `ground_truth`, of type json: see stack/function_calls.py.
    """

    task = "function_calling"
    metrics: Annotated[list[FunctionCallingMetric], Field(min_length=1), at_most(1)] = [FunctionCallingMetric.ast]


AnyEvaluationRequest = (
    EvaluateQuestionAnsweringRequest
    | EvaluateSummarizationRequest
    | EvaluateTextGenerationRequest
    | EvaluateJudgedRequest
    | EvaluateFunctionCallingRequest
)


class EvaluateBenchmarkRequest(Request):
    """An addition to the specification: `tasks` of lm-eval by name, its own and those in the folder STACK_HOME/tasks.

    A task has its own data, prompts and metrics; `num_fewshot` examples stand before each question (as many as the task
    says, if it is not set), of which the first `limit` of each task are asked. With `apply_chat_template` prompts are
    messages of a chat. `checkpoint` is as in all evaluations; `engine` can only be that of the deployment that serves.
    """

    job_uuid: Id
    tasks: Annotated[list[TaskName], Field(min_length=1), at_most(100)]
    checkpoint: Checkpoint
    num_fewshot: Annotated[int, Field(ge=0, le=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    apply_chat_template: bool = False
    engine: JobEngine = JobEngine.serving
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1_234
    priority: Priority = 0

    @field_validator("engine")
    @classmethod
    def _engine_serves(cls, engine: JobEngine) -> JobEngine:
        if engine == JobEngine.own:
            raise ValueError("is 'own', but lm-eval asks the deployment that serves; allowed of a benchmark: 'serving'")
        return engine


class EvaluationJob(Wire):
    job_uuid: str


class EvaluationJobEntry(JobEntry):
    """An evaluation in a list."""


class EvaluationJobStatusResponse(JobState):
    """`metrics` holds the scores, each with the ends of its 95 % interval, as in `em`, `em_low` and `em_high`.

    Of a benchmark they are lm-eval's, as `task/metric`, with the standard errors `task/metric_stderr`.

    `examples` are all, `failed` those without an answer, which count in no score, and `shield_violations` those that
    the model's shields did not pass, whose answer is empty. The cost is in `prompt_tokens`, `completion_tokens` and
    `seconds`, which all attempts took until the last row was answered. BLEU is from 0 to 100, perplexity at least 1, a
    rating from 1 to 5, all other scores are from 0 to 1.
    """


class EvaluationJobArtifactsResponse(Wire):
    job_uuid: str
    path: str | None
    files: list[ArtifactFile]


class CompareEvaluationsRequest(Request):
    """Two completed evaluations of the same task on the same data set, of which `most` examples are to be told."""

    first: Id
    second: Id
    most: Annotated[int, Field(ge=0, le=MAX_CHANGED)] = 20


class Interval(Wire):
    """A score of a set of examples, or a difference of two: its value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    examples: int


class Outcomes(Wire):
    """Of a score that is 0 or 1: how many examples have 1 in both evaluations, in one of them, or in none."""

    both: int
    only_first: int
    only_second: int
    neither: int


class ComparedMetric(Wire):
    """A metric of two evaluations, over the examples that neither failed; `difference` is the second less the first."""

    name: str
    better: Literal["higher", "lower"]
    first: Interval
    second: Interval
    difference: Interval
    outcomes: Outcomes | None = None


class ChangedExample(Wire):
    """An example that the two evaluations score differently. `prompt` is the last message; long texts are cut."""

    row: int
    id: str
    prompt: str
    expected: str
    metric: str
    first_answer: str
    second_answer: str
    first_score: float
    second_score: float


class CompareEvaluationsResponse(Wire):
    """`examples` are paired, `left_out` are those that failed in one of the two. `changed` are those whose score of
    the first metric differs, the greatest difference first, and `changed_examples` how many there are."""

    task: str
    first: str
    second: str
    dataset_sha256: str
    examples: int
    left_out: int
    metrics: list[ComparedMetric]
    changed_examples: int
    changed: list[ChangedExample]
