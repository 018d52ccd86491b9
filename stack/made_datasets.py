"""Data sets that jobs make: uploads of the job's tenant, registered with where they come from.

Their `metadata` say which job made them, with which models, of which prompts (their SHA-256), by which parameters and
by which code.
"""

import hashlib
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from stack import datasets, jobs, uploads
from stack.api.datasets import CreateDatasetRequest, RegisteredDataset, TrainEvalDataset, TrainEvalDatasetColumnType
from stack.context import Context
from stack.errors import Conflict, StackError
from stack.store import Job

BLOCK = 2**20
ROOT = Path(__file__).resolve().parent.parent
KINDS = (jobs.GENERATE, jobs.BATCH_INFERENCE)
# The data sets of a batch.
ANSWERS, ERRORS = "answers", "errors"


def names_of(kind: str, request: dict[str, Any]) -> list[str]:
    """The ids of the data sets that a job of this kind makes; none for those that make no data."""
    match kind:
        case jobs.GENERATE:
            return [request.get("output_dataset") or request["job_uuid"]]
        case jobs.BATCH_INFERENCE:
            return [f"{request['job_uuid']}.{what}" for what in (ANSWERS, ERRORS)]
    return []


def require_free(context: Context, kind: str, request: dict[str, Any], field: str) -> None:
    """Raises Conflict where a data set that a job would make is there already, or another job is going to make it."""
    names = names_of(kind, request)
    for name in names:
        if context.store.datasets.get(context.tenant, name) is not None:
            raise Conflict(f"there is a data set {name!r} already; choose another {field}", param=field)
    with closing(context.store.jobs.unfinished(context.tenant, KINDS)) as others:
        for uuid, other_kind, other in others:
            for name in names_of(other_kind, other):
                if name in names:
                    message = f"the job {uuid!r} is going to make a data set {name!r}; choose another {field}"
                    raise Conflict(message, param=field)


def require_still_free(context: Context, kind: str, request: dict[str, Any]) -> None:
    """Raises Conflict where a data set that a job makes is there by now, before its work begins.

    What an earlier attempt has done is not thrown away for it: at its end the job keeps what it cannot register.
    """
    if jobs.work_folder(context.tenant, request["job_uuid"]).exists():
        return
    for name in names_of(kind, request):
        known = context.store.datasets.get(context.tenant, name)
        if known is not None and not _is_of(known, request["job_uuid"]):
            raise Conflict(f"there is a data set {name!r} already, which this job has not made")


def forget(context: Context, job: Job) -> None:
    """Removes the data sets of a job that is not completed. One that another job needs by now stays."""
    for name in names_of(job.kind, job.request):
        known = context.store.datasets.get(context.tenant, name)
        if known is not None and _is_of(known, job.uuid):
            with suppress(StackError):  # where it cannot be removed now, the job's next attempt takes it
                datasets.delete(context, name)


def register(
    context: Context,
    uuid: str,
    file: Path,
    columns: dict[str, TrainEvalDatasetColumnType],
    lineage: dict[str, Any],
) -> RegisteredDataset | None:
    """Makes a data set of a file of JSON Lines; None for one without rows.

    What an earlier attempt at the same job has registered is taken for it, if it is the same, and replaced if not.
    `lineage` has the `job_uuid`. Raises Conflict for a data set of the same id that is another's, TooLarge and
    StorageFull.
    """
    if not file.exists() or not file.stat().st_size:
        return None
    known = context.store.datasets.get(context.tenant, uuid)
    if known is not None:
        if not _is_of(known, lineage["job_uuid"]):
            raise Conflict(f"there is a data set {uuid!r} already, which this job has not made")
        if known["sha256"] == sha256(file):
            return datasets.get(context, uuid)
        datasets.delete(context, uuid)
    with uploads.receive(context, f"{uuid}.jsonl") as upload, file.open("rb") as content:
        while block := content.read(BLOCK):
            upload.write(block)
        url = upload.publish().content_url
    try:
        described = TrainEvalDataset(columns=columns, content_url=url, metadata=lineage)
        return datasets.create(context, CreateDatasetRequest(uuid=uuid, dataset=described))
    except BaseException:  # it would count as kept, and nobody would know it
        uploads.remove(context, uploads.id_of(url))
        raise


def _is_of(known: dict[str, Any], job_uuid: str) -> bool:
    return bool((known["metadata"] or {}).get("job_uuid") == job_uuid)


def address_of(reference: TrainEvalDataset | str) -> str:
    """The id of a registered data set, or where the content of a described one lies."""
    return reference if isinstance(reference, str) else reference.content_url


def sha256(file: Path) -> str:
    """The hash of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def code_version() -> str:
    """The hash of all code that makes data sets: that of `stack` and of `jobs`."""
    digest = hashlib.sha256()
    for folder in ("stack", "jobs"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)} {sha256(file)}\n".encode())
    return digest.hexdigest()
