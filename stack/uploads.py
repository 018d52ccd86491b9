"""Files that users send for their data sets, and documents for memory banks.

They lie among the artifacts, and count as what the tenant keeps.

An upload is deleted with the last data set that stands on it, or by itself while none does.
"""

import hashlib
import math
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO
from urllib.parse import quote

from stack import disk, quotas
from stack.api.datasets import UploadedFile
from stack.config import home
from stack.context import Context
from stack.dataset_files import format_of
from stack.errors import BadInput, Conflict, NotFound, TooLarge
from stack.store import now

CONTENT = "content"
MAX_NAME = 255
DISK = "the disk of uploads"
# Names of documents, beside those of the formats of data sets.
DOCUMENTS = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf")
# How much arrives between two looks at the free space.
CHECK_BYTES = 64 * 2**20
# What is left of an upload that broke off with its process is removed after so long without a further block.
LEFTOVER_S = 24 * 3600


class Upload:
    """A file that arrives: `write` what comes, then `publish`."""

    def __init__(self, context: Context, name: str, folder: Path, file: BinaryIO) -> None:
        self._context = context
        self._name = name
        self._folder = folder
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, block: bytes) -> None:
        """Adds a block. Raises TooLarge and StorageFull."""
        most = self._context.config.max_dataset_bytes
        before, self._bytes = self._bytes, self._bytes + len(block)
        if self._bytes > most:
            raise TooLarge(f"the file has more than {most} bytes", param="file")
        if before // CHECK_BYTES != self._bytes // CHECK_BYTES:
            require_room(self._context, self._bytes)
        self._digest.update(block)
        with disk.telling_full(DISK):
            self._file.write(block)

    def publish(self) -> UploadedFile:
        """Keeps the file. Raises BadInput for an empty one, and StorageFull."""
        if not self._bytes:
            raise BadInput(f"the file {self._name!r} is empty", param="file")
        with disk.telling_full(DISK):
            self._file.flush()
        quotas.require_room(self._context, self._bytes)
        upload_id = uuid.uuid4().hex
        row = dict(id=upload_id, name=self._name, bytes=self._bytes, sha256=self._digest.hexdigest(), created_at=now())
        # The row comes first: so it counts beside others that arrive at once, and nothing is kept that no row names.
        self._context.store.datasets.add_upload(self._context.tenant, row)
        try:
            quotas.require_room(self._context, 0)
            with disk.telling_full("the artifacts' disk"):
                self._context.artifacts.publish(_artifact(self._context.tenant, upload_id), self._folder)
        except BaseException:
            self._context.store.datasets.delete_upload(self._context.tenant, upload_id)
            raise
        return UploadedFile(**row, content_url=url(upload_id, self._name))


@contextmanager
def receive(context: Context, name: str) -> Iterator[Upload]:
    """Opens a file for an upload of this name; what is not published at the end is gone. Raises BadInput."""
    name = re.split(r"[/\\]", name)[-1]
    if len(name) > MAX_NAME or not name.isprintable():
        message = f"{name[:80]!r} is no name of a file; allowed: at most {MAX_NAME} printable characters"
        raise BadInput(message, param="file")
    try:
        if not name.lower().endswith(DOCUMENTS):
            format_of(name)
    except BadInput as error:
        raise BadInput(f"{error.message}; of a document: {', '.join(DOCUMENTS)}", param="file") from error
    _folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=_folder()) as folder, (Path(folder) / CONTENT).open("wb") as file:
        yield Upload(context, name, Path(folder), file)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what is written while a file is looked at, and gone at the end; `sweep` removes what is left."""
    _folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=_folder()) as folder:
        yield Path(folder)


def require_room(context: Context, size: int) -> None:
    """Raises StorageFull unless the tenant may keep so much more, and there is room for it as it arrives."""
    quotas.require_room(context, size)
    disk.require_room(_folder(), size, DISK)


def page(context: Context, after: str | None, limit: int) -> list[UploadedFile]:
    """Uploads, newest first, behind the one with the id `after`. Raises NotFound."""
    last = _get(context, after, "after") if after is not None else None
    return [_uploaded(row) for row in context.store.datasets.upload_page(context.tenant, last, limit)]


def delete(context: Context, id: str) -> UploadedFile:
    """Deletes an upload on which no data set stands. Raises NotFound and Conflict."""
    upload = _uploaded(_get(context, id, "upload_id"))
    dataset = context.store.datasets.at(context.tenant, upload.content_url)
    if dataset is not None:
        message = f"the data set {dataset!r} stands on the upload {id!r}; it goes with the last data set that does"
        raise Conflict(message, param="upload_id")
    remove(context, id)
    return upload


def remove(context: Context, id: str) -> None:
    """Removes the content of an upload, then what was written down of it."""
    artifact = _artifact(context.tenant, id)
    if context.artifacts.exists(artifact):
        context.artifacts.remove(artifact)
    context.store.datasets.delete_upload(context.tenant, id)


def sweep(_: Context) -> list[str]:
    """Removes what arrived in processes that were killed: what nobody has written to for LEFTOVER_S.

    For the administrator: it sees all tenants' files. Returns the names of what it has removed.
    """
    oldest = time.time() - LEFTOVER_S
    folders = list(_folder().iterdir()) if _folder().is_dir() else []
    left = [folder for folder in folders if _last_written(folder) < oldest]
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(folder.name for folder in left)


def local(context: Context, content_url: str) -> tuple[Path, str]:
    """The local file of an upload, and the name under which it was sent. Raises NotFound."""
    row = context.store.datasets.get_upload(context.tenant, id_of(content_url))
    if row is None or url(row["id"], row["name"]) != content_url:
        raise NotFound(f"there is no upload {content_url!r}", param="dataset.content_url")
    return context.artifacts.local(_artifact(context.tenant, row["id"])) / CONTENT, row["name"]


def url(id: str, name: str) -> str:
    """The address of an upload."""
    return f"upload://{id}/{quote(name)}"


def id_of(content_url: str) -> str:
    """The id in the address of an upload."""
    return content_url.removeprefix("upload://").partition("/")[0]


def _get(context: Context, id: str, field: str) -> dict[str, object]:
    row = context.store.datasets.get_upload(context.tenant, id)
    if row is None:
        raise NotFound(f"there is no upload {id!r}", param=field)
    return row


def _uploaded(row: dict[str, object]) -> UploadedFile:
    about = {key: value for key, value in row.items() if key != "tenant"}
    return UploadedFile(**about, content_url=url(str(row["id"]), str(row["name"])))


def _artifact(tenant: str, id: str) -> str:
    return f"tenants/{tenant}/uploads/{id}"


def _last_written(folder: Path) -> float:
    """When something arrived for an upload last. Other processes end theirs meanwhile: nothing is left of those."""
    for path in (folder / CONTENT, folder):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime
    return math.inf


def _folder() -> Path:
    """Where files arrive: beside the stack's own, not on what may be a small disk for temporary files."""
    return home() / "uploads"
