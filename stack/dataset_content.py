"""The content of data sets: from the addresses that users give to files that can be read."""

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError

from stack import disk, uploads
from stack.config import home
from stack.context import Context
from stack.dataset_files import format_of
from stack.errors import BadInput, StackError, TooLarge, Unavailable
from stack.fetcher import Fetcher

FETCHER = Fetcher()
BLOCK = 2**20
# Characters with which a name would mean something else than an object: patterns, versions, chains of file systems.
_NO_KEY = re.compile(r"[?#*\[\]{}\x00-\x1f\x7f]|::|//|(^|/)\.\.?(/|$)")


@dataclass(frozen=True)
class Content:
    """An open file, and the name that tells its format."""

    file: BinaryIO
    name: str

    @property
    def bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    @property
    def touched_at(self) -> float:
        """When the system has last seen a change of the file, of its name, or of what it says of itself."""
        return os.fstat(self.file.fileno()).st_ctime


@contextmanager
def opened(context: Context, url: str) -> Iterator[Content]:
    """The content at an address, as a local file for reading. What is elsewhere is copied, and the copy is then gone.

    Raises BadInput for an address that is not allowed or has nothing, NotFound for an upload that is not there,
    TooLarge, StorageFull, and Unavailable where what is elsewhere does not answer.
    """
    try:
        content = _open(context, url)
    except StackError as error:
        error.param = error.param or "dataset.content_url"
        raise
    with content.file:
        most = context.config.max_dataset_bytes
        if content.bytes > most:
            raise TooLarge(f"{url} has {content.bytes} bytes; allowed: {most}", param="dataset.content_url")
        yield content


def _open(context: Context, url: str) -> Content:
    match url.partition("://")[0]:
        case "upload":
            file, name = uploads.local(context, url)
            return Content(opened_file(file, url), name)
        case "s3" | "gs":
            return _from_storage(context, url)
        case "https":
            file_name = _name_in(url)
            copy = _copy_of(context, url, 0)
            try:
                FETCHER.fetch(url, copy, context.config.max_dataset_bytes)
            except BaseException:
                copy.close()
                raise
            return Content(_from_start(copy), file_name)
        case _:
            file = local_file(context, url)
            return Content(opened_file(file, url), file.name)


def _name_in(url: str) -> str:
    """The name of the file at an address, which must promise rows before anything is fetched."""
    try:
        name = unquote(urlsplit(url).path).rpartition("/")[2]
    except ValueError as error:
        raise BadInput(f"{url!r} is no address: {error}") from error
    format_of(name)
    return name


def local_file(context: Context, url: str) -> Path:
    """The local file at an address. Raises BadInput where it is none that users may read."""
    try:
        address = urlsplit(url)
        file = Path(unquote(address.path)).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # what it says of a place outside of the roots is not told
        raise BadInput(f"{url!r} is no address of a local file") from error
    if address.netloc not in ("", "localhost") or address.query or address.fragment:
        raise BadInput(f"{url!r} is no address of a local file; allowed: file:///folder/name.jsonl")
    roots = context.config.data_folders
    if not any(file.is_relative_to(root) for root in roots):
        allowed = ", ".join(str(root) for root in roots)
        raise BadInput(f"{url} is outside of the data folders: {allowed}")
    try:
        is_file = file.is_file()
    except (OSError, ValueError) as error:
        raise BadInput(f"{url!r} is no address of a local file") from error
    if not is_file:
        raise BadInput(f"there is no file {url}")
    return file


def opened_file(file: Path, url: str) -> BinaryIO:
    """Opens a file, but not what would block or lead elsewhere, if that has come into its place since.

    Raises BadInput.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError as error:
        raise BadInput(f"{url} may not be read") from error
    except OSError as error:
        raise BadInput(f"there is no file {url}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(f"there is no file {url}")
    return os.fdopen(descriptor, "rb")


def _from_storage(context: Context, url: str) -> Content:
    """A copy of an object, if its address is under one of the prefixes that users may read."""
    prefixes = context.config.data_prefixes
    if not any(url.startswith(prefix) for prefix in prefixes):
        raise BadInput(f"{url} is outside of the data roots: {', '.join(prefixes) or 'none is in object storage'}")
    kind, _, path = url.partition("://")
    if _NO_KEY.search(path):
        raise BadInput(f"{url!r} is no address of an object; allowed: {kind}://bucket/folder/name.jsonl")
    try:
        storage = fsspec.filesystem(kind, use_listings_cache=False, skip_instance_cache=True)
        about = storage.info(path)
        if about["type"] != "file":
            raise BadInput(f"there is no file {url}")
        if about["size"] > context.config.max_dataset_bytes:
            raise TooLarge(f"{url} has {about['size']} bytes; allowed: {context.config.max_dataset_bytes}")
        copy = _copy_of(context, url, about["size"])
        try:
            with (
                disk.telling_full(f"the disk for a copy of {url}"),
                storage.open(path, "rb", block_size=8 * BLOCK, cache_type="readahead") as source,
            ):
                shutil.copyfileobj(source, copy, BLOCK)
        except BaseException:
            copy.close()
            raise
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {url}") from error
    except PermissionError as error:
        raise BadInput(f"{url} may not be read") from error
    except ImportError as error:
        raise BadInput(f"{kind}:// needs a package that is not installed: {error}") from error
    except (BotoCoreError, aiohttp.ClientError) as error:
        raise Unavailable(f"the storage of {url} does not answer ({type(error).__name__})") from error
    return Content(_from_start(copy), path.rpartition("/")[2])


def _copy_of(context: Context, url: str, size: int) -> BinaryIO:
    """A file without a name, which is gone with this process whatever happens, for a copy of so many bytes."""
    folder = home() / "cache"
    disk.require_room(folder, size or context.config.max_dataset_bytes, f"the disk for a copy of {url}")
    return TemporaryFile(dir=folder)


def _from_start(file: BinaryIO) -> BinaryIO:
    with disk.telling_full("the disk for copies of data sets"):
        file.flush()
    file.seek(0)
    return file
