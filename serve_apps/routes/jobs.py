"""What is the same of all long work: cancelling it, and its log."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from serve_apps.routes.common import ContextOf, JobUuid, event_stream
from stack import jobs, made_datasets
from stack.api.jobs import CancelJobRequest, CancelledJob, JobLogStream, JobStatus
from stack.context import Context

Status = Annotated[JobStatus | None, Query(description="only jobs in this state")]
Kind = Annotated[str | None, Query(max_length=40, description="only jobs of this kind")]
After = Annotated[str | None, Query(max_length=100, description="the job_uuid of the last job of the page before")]
Limit = Annotated[int, Query(ge=1, le=1_000)]


def add_job_routes(router: APIRouter, kinds: Sequence[str]) -> None:
    """Adds the routes that all jobs share to the router of an API."""

    @router.post("/job/cancel", response_model_exclude_none=True)
    def cancel(context: ContextOf, body: CancelJobRequest) -> CancelledJob:
        """Cancels a job: its work is stopped within seconds. Cancelling it again, or one that has ended, is fine."""
        job = jobs.cancel(context, body.job_uuid, kinds)
        if job.status == JobStatus.cancelled:  # between two attempts, say, of which the last has registered data sets
            made_datasets.forget(context, job)
        return CancelledJob(job_uuid=job.uuid, status=JobStatus(job.status), cancelled_at=job.cancelled_at)

    @router.get("/job/logs", response_model=JobLogStream)
    async def logs(
        request: Request,
        context: ContextOf,
        job_uuid: JobUuid,
        follow: bool = False,
        after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
        limit: Limit = 1_000,
        accept: Annotated[str, Header()] = "",
    ) -> JobLogStream | StreamingResponse:
        """The lines that a job has written; with `follow` and `Accept: text/event-stream`, as they come, to its end."""
        if follow and "text/event-stream" in accept:
            await asyncio.to_thread(jobs.get, context, job_uuid, kinds)  # an unknown job is a 404, not a stream
            return event_stream(request, _events(context, job_uuid, kinds, after))
        lines = await asyncio.to_thread(jobs.logs, context, job_uuid, kinds, after, limit)
        last = lines[-1].number if lines else after
        return JobLogStream(job_uuid=job_uuid, log_lines=[line.message for line in lines], lines=lines, next=last)


async def _events(context: Context, job_uuid: str, kinds: Sequence[str], after: int) -> AsyncGenerator[bytes]:
    async with aclosing(jobs.follow(context, job_uuid, kinds, after)) as lines:
        async for line in lines:
            event = {"job_uuid": job_uuid, "log_lines": [line.message], **line.model_dump()}
            yield b"data: " + json.dumps(event).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
