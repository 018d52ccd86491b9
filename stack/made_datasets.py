"""Data sets that jobs make: uploads of the job's tenant, registered with where they come from.

Their `metadata` say which job made them, with which models, of which prompts (their SHA-256), by which parameters and
by which code.
"""

import hashlib
from pathlib import Path
from typing import Any

from stack import datasets, uploads
from stack.api.datasets import CreateDatasetRequest, RegisteredDataset, TrainEvalDataset, TrainEvalDatasetColumnType
from stack.context import Context
from stack.errors import Conflict

BLOCK = 2**20
ROOT = Path(__file__).resolve().parent.parent


def require_free(context: Context, uuid: str, field: str) -> None:
    """Raises Conflict where there is a data set of this id already."""
    if context.store.datasets.get(context.tenant, uuid) is not None:
        raise Conflict(f"there is a data set {uuid!r} already; choose another {field}", param=field)


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
        if (known["metadata"] or {}).get("job_uuid") != lineage["job_uuid"]:
            raise Conflict(f"there is a data set {uuid!r} already, which this job has not made")
        if known["sha256"] == sha256(file):
            return datasets.get(context, uuid)
        datasets.delete(context, uuid)
    with uploads.receive(context, f"{uuid}.jsonl") as upload, file.open("rb") as content:
        while block := content.read(BLOCK):
            upload.write(block)
        url = upload.publish().content_url
    described = TrainEvalDataset(columns=columns, content_url=url, metadata=lineage)
    return datasets.create(context, CreateDatasetRequest(uuid=uuid, dataset=described))


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
