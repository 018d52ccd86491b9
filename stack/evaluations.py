"""Evaluations: what is checked before a job is accepted, and what a finished one has found."""

from stack import datasets, jobs
from stack.api.evaluations import (
    EvaluateQuestionAnsweringRequest,
    EvaluationJobArtifactsResponse,
    EvaluationJobStatusResponse,
)
from stack.api.jobs import ArtifactFile
from stack.context import Context
from stack.errors import NotFound
from stack.inference import sampling_body
from stack.models import Model
from stack.post_training import model_id
from stack.store import Job

KINDS = (jobs.EVALUATE,)


def question_answering(
    context: Context, request: EvaluateQuestionAnsweringRequest, submission_id: str | None = None
) -> Job:
    """Accepts an evaluation. Raises BadInput for data that has no examples, NotFound, Conflict."""
    if context.store.job(request.job_uuid) is None:
        try:
            model_of(context, request.checkpoint)
        except NotFound as error:
            error.param = "checkpoint"
            raise
        sampling_body(request.sampling_params)
        datasets.check_examples(context, request.dataset, "dataset")
    return jobs.submit(context, jobs.EVALUATE, request.job_uuid, request.model_dump(mode="json"), submission_id)


def model_of(context: Context, checkpoint: str) -> Model:
    """The served model that a checkpoint means: by its id, or by the fine-tuning job that made it. Raises NotFound."""
    try:
        return context.models.get(checkpoint)
    except NotFound:
        job = context.store.job(checkpoint)
        if job is None or job.kind != jobs.SUPERVISED_FINE_TUNE:
            raise
        return context.models.get(model_id(job.request["model"], job.uuid))


def job_status(context: Context, job_uuid: str) -> EvaluationJobStatusResponse:
    """How far an evaluation is, and its scores once it is completed. Raises NotFound."""
    return EvaluationJobStatusResponse(**jobs.state(context, jobs.get(context, job_uuid, KINDS)))


def job_artifacts(context: Context, job_uuid: str) -> EvaluationJobArtifactsResponse:
    """The files that an evaluation has made: each example with its output and scores. Raises NotFound."""
    result = jobs.get(context, job_uuid, KINDS).result or {}
    return EvaluationJobArtifactsResponse(
        job_uuid=job_uuid,
        path=result.get("path"),
        files=[ArtifactFile(**file) for file in result.get("files", [])],
    )


def results_name(job_uuid: str) -> str:
    """The artifact that holds the results of an evaluation by example."""
    return f"evaluations/{job_uuid}"
