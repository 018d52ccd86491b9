"""Files by address, on fsspec: a local folder by default, object storage by address.

An artifact is a folder of files under a name. It is there when its manifest is: files are written under a temporary
name and hashed, moved to their place, and the manifest, with sizes and hashes, is put last. Readers look for the
manifest first, so they see all of an artifact or nothing.
"""

import hashlib
import json
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stack.errors import BadInput, NotFound, StorageFull

MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class File:
    """A file of an artifact: its name within it, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str


class Artifacts:
    """The artifacts under an fsspec address; `cache` is where remote ones are copied for those who need local files."""

    def __init__(self, url: str, cache: Path) -> None:
        self._files, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")
        self._cache = cache
        self._is_local = isinstance(self._files, LocalFileSystem)

    def publish(self, name: str, folder: Path) -> list[File]:
        """Makes an artifact of the files in a local folder.

        Raises BadInput for an unsafe name or one that is taken, and OSError as it comes (a full disk, say), in which
        case nothing is left behind.
        """
        target = self._path(name)
        if self.exists(name):
            raise BadInput(f"there is an artifact {name!r} already")
        part = f"{self._root}/.part-{uuid.uuid4().hex}"
        if (folder / MANIFEST).exists():
            raise BadInput(f"a file of an artifact cannot be called {MANIFEST!r}")
        sources = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        try:
            self._files.makedirs(part, exist_ok=True)
            files = [self._put(source, part, source.relative_to(folder).as_posix()) for source in sources]
            if self._files.exists(target):  # what an interrupted publish left, without a manifest
                self._files.rm(target, recursive=True)
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._files.mv(part, target, recursive=True)
            self._files.pipe_file(f"{target}/{MANIFEST}.part", json.dumps([asdict(file) for file in files]).encode())
            self._files.mv(f"{target}/{MANIFEST}.part", f"{target}/{MANIFEST}")
        except OSError:
            for leftover in (part, target):
                if self._files.exists(leftover):
                    self._files.rm(leftover, recursive=True)
            raise
        return files

    def files(self, name: str) -> list[File]:
        """The files of an artifact. Raises NotFound."""
        try:
            manifest = self._files.cat_file(f"{self._path(name)}/{MANIFEST}")
        except FileNotFoundError as error:
            raise NotFound(f"there is no artifact {name!r}") from error
        return [File(**entry) for entry in json.loads(manifest)]

    def local(self, name: str) -> Path:
        """A local folder with the artifact's files, for reading. Raises NotFound."""
        files = self.files(name)
        if self._is_local:
            return Path(self._path(name))
        folder = self._cache / name
        for file in files:
            copy = folder / file.name
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                part = copy.with_name(f"{copy.name}.part-{uuid.uuid4().hex}")
                self._files.get_file(f"{self._path(name)}/{file.name}", str(part))
                if _sha256(part) != file.sha256:
                    part.unlink()
                    raise OSError(f"{file.name} of the artifact {name!r} is not what was published")
                part.rename(copy)
        return folder

    def require_room(self, size: int) -> None:
        """Raises StorageFull unless so many bytes are free."""
        self._files.makedirs(self._root, exist_ok=True)
        free = shutil.disk_usage(self._root).free if self._is_local else None
        if free is not None and free < size:
            raise StorageFull(f"the artifacts' disk has {free} bytes left, and {size} are needed")

    def exists(self, name: str) -> bool:
        return bool(self._files.exists(f"{self._path(name)}/{MANIFEST}"))

    def remove(self, name: str) -> None:
        """Removes an artifact, its manifest first, so that nobody finds a part of it."""
        self._files.rm_file(f"{self._path(name)}/{MANIFEST}")
        self._files.rm(self._path(name), recursive=True)

    def url(self, name: str) -> str:
        """The address of an artifact."""
        return str(self._files.unstrip_protocol(self._path(name)))

    def _put(self, source: Path, part: str, name: str) -> File:
        digest = _sha256(source)
        target = f"{part}/{name}"
        self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._files.put_file(str(source), target)
        return File(name, source.stat().st_size, digest)

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name) or ".." in name:
            allowed = "letters, digits, '.', '_', '-', parted by '/'"
            raise BadInput(f"{name!r} is no name of an artifact; allowed: {allowed}")
        return f"{self._root}/{name}"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
