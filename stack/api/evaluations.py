"""Wire types of the evaluation API."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stack.api.datasets import DatasetReference
from stack.api.inference import SamplingParams
from stack.api.jobs import ArtifactFile, JobEntry, JobState, Priority
from stack.api.wire import Id, ModelId, Request, Wire, at_most


class QuestionAnsweringMetric(StrEnum):
    """Exact match and token F1 after SQuAD's normalisation (Rajpurkar et al. 2016, arXiv 1606.05250)."""

    em = "em"
    f1 = "f1"


class EvaluateQuestionAnsweringRequest(Request):
    """`checkpoint` is the id of a served model, or the job_uuid of the fine-tuning that made it."""

    job_uuid: Id
    dataset: DatasetReference
    checkpoint: ModelId
    sampling_params: SamplingParams
    metrics: Annotated[list[QuestionAnsweringMetric], Field(min_length=1), at_most(2)]
    priority: Priority = 0


class EvaluationJob(Wire):
    job_uuid: str


class EvaluationJobEntry(JobEntry):
    """An evaluation in a list."""


class EvaluationJobStatusResponse(JobState):
    """`metrics` holds the scores (0 to 1), `examples`, `seconds`, `prompt_tokens` and `completion_tokens`."""


class EvaluationJobArtifactsResponse(Wire):
    job_uuid: str
    path: str | None
    files: list[ArtifactFile]
