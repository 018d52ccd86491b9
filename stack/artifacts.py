"""Files by address, on fsspec: a local folder by default, object storage by address.

An artifact is a folder of files under a name. It is there when its manifest is: the files are hashed and written
first, and the manifest, with their sizes and hashes, is put last. Readers look for the manifest, so they see all of an
artifact or nothing. In a local folder the files are written under a temporary name that is then changed. In object
storage, where an object is there when all of it is and changing a name means a copy of it, they go to their place at
once.

Object storage is `s3://bucket/prefix` (S3 and what speaks its protocol) or `gs://bucket/prefix`. Its keys, region and
server are found by the client of that storage as it documents it: for S3 in the variables AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3, or in the files and roles of the AWS tools.
"""

import datetime as dt
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from stack import copies, disk
from stack.errors import BadInput, NotFound, Unavailable

MANIFEST = "manifest.json"
BLOCK = 2**20
CACHE_BYTES = 20 * 2**30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_PART = ".part-"


@dataclass(frozen=True)
class File:
    """A file of an artifact: its name within it, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str


def _no_answer(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What the clients of object storage raise, beside OSError, when it does not answer, and others.

    They are imported here, as thousands of processes never ask for an artifact.
    """
    import aiohttp
    from botocore.exceptions import BotoCoreError

    return BotoCoreError, aiohttp.ClientError, *others


@contextmanager
def _reaching() -> Iterator[None]:
    """Raises Unavailable where the storage does not answer, which its client has tried several times by then."""
    try:
        yield
    except _no_answer() as error:  # which is asked when something was raised alone
        raise Unavailable(f"the storage of the artifacts does not answer ({type(error).__name__})") from error


class Artifacts:
    """The artifacts under an fsspec address; `cache` is where remote ones are copied for those who need local files.

    Of the copies, `cache_bytes` are kept, and those that were asked for lately.

    Every method that reaches for the storage raises Unavailable when it does not answer.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int = CACHE_BYTES) -> None:
        self._url = url
        self._cache = cache
        self._cache_bytes = cache_bytes

    def open(self) -> None:
        """What else is done when they are first asked for. Raises BadInput for an address that cannot be one."""
        _ = self._opened

    @cached_property
    def _opened(self) -> tuple[AbstractFileSystem, str]:
        """The storage, and where in it the artifacts are. Of S3, a process takes 18 MB more from then on."""
        try:
            # Without its cache of listings: other processes write too, and what they have written must be seen.
            files, root = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise BadInput(f"artifacts cannot be kept at {self._url!r}: {error}", param="artifacts") from error
        return files, root.rstrip("/")

    @property
    def _files(self) -> AbstractFileSystem:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @property
    def _is_local(self) -> bool:
        return isinstance(self._files, LocalFileSystem)

    @_reaching()
    def publish(self, name: str, folder: Path) -> list[File]:
        """Makes an artifact of the files in a local folder. Links in it are left out, never followed.

        Raises BadInput for an unsafe name or one that is taken, and OSError as it comes (a full disk, say), in which
        case nothing is left behind. What a process that is killed leaves is no artifact, and goes when the name is
        published again.
        """
        target = self._path(name)
        if self.exists(name):
            raise BadInput(f"there is an artifact {name!r} already")
        if (folder / MANIFEST).exists():
            raise BadInput(f"a file of an artifact cannot be called {MANIFEST!r}")
        sources = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = [_file(source, source.relative_to(folder).as_posix()) for source in sources]
        manifest = json.dumps([asdict(file) for file in files]).encode()
        self._clear(target)
        if self._is_local:
            self._put_locally(sources, files, manifest, target)
        else:
            self._put_remotely(sources, files, manifest, target)
        return files

    @_reaching()
    def files(self, name: str) -> list[File]:
        """The files of an artifact. Raises NotFound."""
        return _files_of(self._manifest(name))

    @_reaching()
    def local(self, name: str) -> Path:
        """A local folder with the artifact's files, for reading within the hour. Raises NotFound."""
        manifest = self._manifest(name)
        files = _files_of(manifest)
        if self._is_local:
            return Path(self._path(name))
        # By what is in it, so that another artifact of the same name, after a removal, is not taken for this one.
        folder = copies.place(self._cache, name, hashlib.sha256(manifest).hexdigest()[:16])
        missing = [file for file in files if not (folder / file.name).exists()]
        parts = [folder / f"{file.name}{_PART}{uuid.uuid4().hex}" for file in missing]
        try:
            self._files.get([f"{self._path(name)}/{file.name}" for file in missing], [str(part) for part in parts])
            for file, part in zip(missing, parts, strict=True):
                if _sha256(part) != file.sha256:
                    raise OSError(f"{file.name} of the artifact {name!r} is not what was published")
                part.rename(folder / file.name)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        if missing:
            copies.evict(self._cache, self._cache_bytes)
        return folder

    def blocks(self, name: str, file: File, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The content of a file from one byte to before another, in blocks, of which one at a time is in memory."""
        path = f"{self._path(name)}/{file.name}"
        stop = file.bytes if stop is None else stop
        while start < stop:
            with _reaching():
                try:
                    block = self._files.cat_file(path, start=start, end=min(start + BLOCK, stop))
                except FileNotFoundError as error:
                    raise NotFound(f"the file {file.name!r} of the artifact {name!r} is gone") from error
            if not block:
                raise OSError(errno.EIO, f"{file.name} of the artifact {name!r} is shorter than what was published")
            yield block
            start += len(block)

    @property
    def folder(self) -> Path | None:
        """Where the artifacts lie, if that is a local folder."""
        return Path(self._root) if self._is_local else None

    def require_room(self, size: int) -> None:
        """Raises StorageFull unless so many bytes are free. Object storage has no such bound."""
        if not self._is_local:
            return
        disk.require_room(Path(self._root), size, "the artifacts' disk")

    @_reaching()
    def exists(self, name: str) -> bool:
        return bool(self._files.exists(f"{self._path(name)}/{MANIFEST}"))

    @_reaching()
    def remove(self, name: str) -> None:
        """Removes an artifact, its manifest first, so that nobody finds a part of it.

        One that is not there is no error: a removal that broke off is made whole by another.
        """
        target = self._path(name)
        if self.exists(name):
            self._files.rm_file(f"{target}/{MANIFEST}")
        self._clear(target)
        copies.remove(self._cache, name)

    @_reaching()
    def names(self, folder: str) -> list[str]:
        """The names right under a folder, of artifacts and of what interrupted publications and removals have left."""
        try:
            paths = self._files.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{path.rstrip('/').rsplit('/', 1)[-1]}" for path in paths)

    @_reaching()
    def remove_if_older(self, name: str, age: dt.timedelta) -> bool:
        """Removes an artifact, or what is left of one, unless a file of it was written within this time."""
        newest = [self._files.modified(path) for path in self._files.find(self._path(name))]
        if any(time > dt.datetime.now(dt.UTC) - age for time in newest):
            return False
        self.remove(name)
        return True

    def remove_temporary(self, age: dt.timedelta) -> int:
        """Removes what publications that were interrupted so long ago have left under temporary names; says how many.

        There are such names only in a local folder.
        """
        if not self._is_local:
            return 0
        oldest = (dt.datetime.now(dt.UTC) - age).timestamp()
        left = [part for part in Path(self._root).glob(f"{_PART}*") if part.stat().st_mtime < oldest]
        for part in left:
            shutil.rmtree(part)
        return len(left)

    def url(self, name: str) -> str:
        """The address of an artifact."""
        return str(self._files.unstrip_protocol(self._path(name)))

    def _put_locally(self, sources: list[Path], files: list[File], manifest: bytes, target: str) -> None:
        part = f"{self._root}/{_PART}{uuid.uuid4().hex}"
        made = part
        try:
            self._files.makedirs(part)
            for folder in {f"{part}/{file.name}".rsplit("/", 1)[0] for file in files}:
                self._files.makedirs(folder, exist_ok=True)
            self._files.put([str(source) for source in sources], [f"{part}/{file.name}" for file in files])
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            os.rename(part, target)  # fails where another process has published this name meanwhile
            made = target
            self._files.pipe_file(f"{target}/{MANIFEST}{_PART}", manifest)
            os.rename(f"{target}/{MANIFEST}{_PART}", f"{target}/{MANIFEST}")
        except OSError:
            self._clear(made)
            raise

    def _put_remotely(self, sources: list[Path], files: list[File], manifest: bytes, target: str) -> None:
        try:
            # One request a file, many at once.
            self._files.put([str(source) for source in sources], [f"{target}/{file.name}" for file in files])
            self._files.pipe_file(f"{target}/{MANIFEST}", manifest)
        except _no_answer(OSError):
            self._clear(target)
            raise

    def _clear(self, path: str) -> None:
        """Removes what there is under a path."""
        if self._files.exists(path):
            self._files.rm(path, recursive=True)

    def _manifest(self, name: str) -> bytes:
        try:
            return bytes(self._files.cat_file(f"{self._path(name)}/{MANIFEST}"))
        except FileNotFoundError as error:
            raise NotFound(f"there is no artifact {name!r}") from error

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name) or ".." in name:
            allowed = "letters, digits, '.', '_', '-', parted by '/'"
            raise BadInput(f"{name!r} is no name of an artifact; allowed: {allowed}")
        return f"{self._root}/{name}"


def _file(source: Path, name: str) -> File:
    return File(name, source.stat().st_size, _sha256(source))


def _files_of(manifest: bytes) -> list[File]:
    """The files in a manifest, whose names lead to nowhere else: others may write where artifacts are kept."""
    files = [File(**entry) for entry in json.loads(manifest)]
    for file in files:
        path = PurePosixPath(file.name)
        if not path.parts or path.is_absolute() or {"..", "\0"} & {*path.parts, *file.name} or str(path) != file.name:
            raise OSError(f"the manifest of an artifact has a file named {file.name[:100]!r}")
    return files


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
