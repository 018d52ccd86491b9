"""Evaluations: what is checked before a job is accepted, and what a finished one has found."""

from typing import Any

from stack import datasets, jobs, quotas
from stack.api.evaluations import (
    EvaluateQuestionAnsweringRequest,
    EvaluationJobArtifactsResponse,
    EvaluationJobEntry,
    EvaluationJobStatusResponse,
)
from stack.api.jobs import ArtifactFile, JobStatus
from stack.context import Context
from stack.datasets import Size
from stack.errors import NotFound
from stack.inference import sampling_body
from stack.models import Model
from stack.post_training import model_id
from stack.store import Job

KINDS = (jobs.EVALUATE,)
# What the worker that asks the questions reserves.
ASKER_CPUS = 0.25
# What the results say of each example beside its messages, about: an answer, scores, times.
RESULT_BYTES = 1_024


def question_answering(
    context: Context, request: EvaluateQuestionAnsweringRequest, submission_id: str | None = None
) -> Job:
    """Accepts an evaluation. Raises BadInput for data that has no examples, NotFound, Conflict."""
    known = context.store.jobs.get(context.tenant, request.job_uuid)
    if known is not None:
        request = datasets.as_accepted(request, known.request)
    else:
        try:
            model_of(context, request.checkpoint)
        except NotFound as error:
            error.param = "checkpoint"
            raise
        sampling_body(request.sampling_params)
        request, found = datasets.accept(context, request, datasets.EXAMPLES)
        _require_room(context, request, [datasets.size(context, one) for one in found])
    return jobs.submit(
        context, jobs.EVALUATE, request.job_uuid, request.model_dump(mode="json"),
        bundles=[{"CPU": ASKER_CPUS}], submission_id=submission_id,
    )  # fmt: skip


def resources(context: Context, request: EvaluateQuestionAnsweringRequest) -> dict[str, Any]:
    """What an evaluation that starts takes beside the model that serves.

    Raises StorageFull where there is no room for it: there may have been more when it was accepted.
    """
    _require_room(context, request, datasets.sizes_before_reading(context, request))
    return {"workers": 1, "per_worker": {"CPU": ASKER_CPUS}}


def list_jobs(
    context: Context, kind: str | None, status: JobStatus | None, after: str | None, limit: int
) -> list[EvaluationJobEntry]:
    """Evaluations, newest first."""
    return [EvaluationJobEntry(**jobs.entry(job)) for job in jobs.page(context, KINDS, kind, status, after, limit)]


def model_of(context: Context, checkpoint: str) -> Model:
    """The served model that a checkpoint means: by its id, or by the fine-tuning job that made it. Raises NotFound."""
    try:
        return context.models.get(checkpoint)
    except NotFound:
        job = context.store.jobs.get(context.tenant, checkpoint)
        if job is None or job.kind != jobs.SUPERVISED_FINE_TUNE:
            raise
        return context.models.get(model_id(job.tenant, job.request["model"], job.uuid))


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


def results_name(tenant: str, job_uuid: str) -> str:
    """The artifact that holds the results of an evaluation by example."""
    return jobs.artifact_name(tenant, jobs.RESULTS, job_uuid)


def _require_room(context: Context, request: EvaluateQuestionAnsweringRequest, sizes: list[Size]) -> None:
    """Raises StorageFull unless there is room for the results, which repeat all messages, with other letters escaped.

    They are written to the job's folder, and become an artifact at its end.
    """
    results = sum(2 * size.text + size.rows * RESULT_BYTES for size in sizes)
    work = jobs.work_folder(context.tenant, request.job_uuid)
    quotas.require_room_for_job(context, kept=results, temporary=results, work=work)
