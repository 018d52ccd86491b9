"""Where the content of data sets may lie, and what no address can reach."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import fsspec
import pytest

from stack import dataset_content, uploads
from stack.api.datasets import TrainEvalDataset
from stack.context import Context
from stack.dataset_content import opened
from stack.datasets import check, resolve, rows
from stack.errors import BadInput, Conflict, NotFound, StackError, StorageFull, TooLarge, Unavailable
from stack.fetcher import Fetcher
from tests.s3 import S3

ROWS = b'{"x": 1}\n{"x": 2}\n'


def read(context: Context, url: str) -> bytes:
    with opened(context, url) as content:
        return content.file.read()


def refused(context: Context, url: str) -> StackError:
    with pytest.raises(StackError) as caught:
        read(context, url)
    assert caught.value.param == "dataset.content_url"
    return caught.value


def changed(context: Context, **config: Any) -> Context:
    config_now = context.config.model_copy(update=config)
    return Context(config_now, context.store, context.artifacts, context.engine)


def left_behind(home: Path) -> list[Path]:
    return [path for name in ("cache", "uploads") for path in (home / name).rglob("*") if path.is_file()]


# Files


def pipe(file: Path) -> None:
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.mkdir()


def link_to(target: str) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(target)


@pytest.mark.parametrize(
    "make",
    [
        *(
            pipe,
            folder,
            link_to("/dev/zero"),
            link_to("/dev/stdin"),
            link_to("/proc/self/environ"),
            link_to("/etc/passwd"),
        ),
        *(link_to("a.jsonl"), link_to("/proc/self/fd/0"), link_to("/proc/self/root/etc/passwd"), link_to("none")),
        link_to("../../../../../../etc/passwd"),
    ],
)
def test_what_is_no_file_under_a_root_is_refused_at_once(
    context: Context, home: Path, make: Callable[[Path], None]
) -> None:
    make(home / "data" / "a.jsonl")
    begun = time.monotonic()
    error = refused(context, f"file://{home}/data/a.jsonl")
    assert isinstance(error, BadInput)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("make", [pipe, link_to("/dev/zero"), folder], ids=["pipe", "link", "folder"])
def test_what_comes_into_the_place_of_a_file_meanwhile_is_refused(
    context: Context, home: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    file = home / "data" / "a.jsonl"
    file.write_bytes(ROWS)
    local = dataset_content.local_file

    def replaced(*arguments: Any) -> Path:
        found = local(*arguments)
        file.unlink()
        make(file)
        return found

    monkeypatch.setattr(dataset_content, "local_file", replaced)
    assert isinstance(refused(context, file.as_uri()), BadInput)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "file://{data}/../a.jsonl",
            "file://{data}/%2e%2e/a.jsonl",
            "file://{data}/..%2fa.jsonl",
            "file:///{data}/../../etc/x",
        ),
        *(
            "file://host{data}/a.jsonl",
            "file://127.0.0.1{data}/a.jsonl",
            "file://{data}/a.jsonl?x",
            "file://{data}/a.jsonl#x",
        ),
        *("file://{data}/a.jsonl%00", "file://{data}/a.jsonl\0.jsonl", "file://{data}/%ff.jsonl", "file://{data}"),
        *("file://{data}/a.jsonl/", "file://{data}/a.jsonl/../b.jsonl", "file://~/a.jsonl", "file://./a.jsonl"),
        "file://{data}/" + "a/" * 1_500 + "a.jsonl",
    ],
)
def test_tricks_with_paths_lead_nowhere(context: Context, home: Path, url: str) -> None:
    (home / "a.jsonl").write_bytes(b"secret")
    error = refused(context, url.format(data=home / "data"))
    assert isinstance(error, BadInput)


def test_a_file_over_the_bound_is_not_opened_for_reading(context: Context, home: Path) -> None:
    file = home / "data" / "a.jsonl"
    with file.open("wb") as stream:
        stream.truncate(10 * 2**30)  # a hole
    error = refused(context, file.as_uri())
    assert isinstance(error, TooLarge)
    assert error.message == f"file://{file} has 10737418240 bytes; allowed: 65536"


# Uploads


def upload(context: Context, content: bytes = ROWS) -> str:
    with uploads.receive(context, "a.jsonl") as file:
        file.write(content)
        return file.publish().content_url


def test_an_upload_is_read_by_its_tenant_alone(context: Context) -> None:
    url = upload(context)
    assert read(context, url) == ROWS
    error = refused(context.of_tenant("acme"), url)
    assert isinstance(error, NotFound)


def test_an_upload_whose_content_is_gone_is_not_found(context: Context, home: Path) -> None:
    url = upload(context)
    shutil.rmtree(home / "artifacts" / "tenants" / "default" / "uploads")
    assert isinstance(refused(context, url), NotFound)


# Object storage


@pytest.fixture
def bucket(s3: S3) -> str:
    return s3.bucket()


def put(url: str, content: bytes = ROWS) -> None:
    fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True).pipe_file(url, content)


def test_an_object_under_a_configured_prefix_is_read(context: Context, home: Path, bucket: str) -> None:
    put(f"{bucket}/deep/a b ä.jsonl")
    context = changed(context, data_roots=["data", bucket])
    assert read(context, f"{bucket}/deep/a b ä.jsonl") == ROWS
    assert left_behind(home) == []


def test_objects_elsewhere_are_refused_whatever_is_there(context: Context, bucket: str) -> None:
    for url in (f"{bucket}/a.jsonl", f"{bucket}-other/a.jsonl"):
        put(url)
    assert "none is in object storage" in refused(context, f"{bucket}/a.jsonl").message
    context = changed(context, data_roots=["data", bucket])
    prefix = bucket.removesuffix("/some/prefix")
    for url in (
        f"{bucket}-other/a.jsonl",
        f"{prefix}/a.jsonl",
        f"{prefix}/some/a.jsonl",
        f"{prefix}-other/some/prefix/a.jsonl",
        "s3://",
        "gs://bucket/a.jsonl",
        bucket,
    ):
        assert "is outside of the data roots" in refused(context, url).message
    for name in (
        "../a.jsonl",
        "x/../../a.jsonl",
        "a.jsonl?versionId=1",
        "*.jsonl",
        "[a].jsonl",
        "x//a.jsonl",
        "a\0",
        "./a",
    ):
        assert "is no address of an object" in refused(context, f"{bucket}/{name}").message
    for name in ("a.jsonl::file:///etc/passwd", "simplecache::a.jsonl"):
        assert "is no address of an object" in refused(context, f"{bucket}/{name}").message


def test_an_object_that_is_not_there_is_named(context: Context, bucket: str) -> None:
    put(f"{bucket}/folder/a.jsonl")
    context = changed(context, data_roots=["data", bucket])
    for name in ("none.jsonl", "folder", "folder/"):
        assert refused(context, f"{bucket}/{name}").message.startswith("there is no file s3://")


def test_an_object_over_the_bound_is_not_copied(context: Context, bucket: str, s3: S3) -> None:
    put(f"{bucket}/a.jsonl", bytes(70_000))
    context = changed(context, data_roots=[bucket])
    s3.requests.clear()
    error = refused(context, f"{bucket}/a.jsonl")
    assert isinstance(error, TooLarge)
    assert "has 70000 bytes; allowed: 65536" in error.message
    assert s3.requests["GET"] <= 1


def test_an_object_that_changes_is_found_out(context: Context, bucket: str) -> None:
    context = changed(context, data_roots=[bucket])
    put(f"{bucket}/a.jsonl")
    described = TrainEvalDataset.model_validate({"columns": {"x": "number"}, "content_url": f"{bucket}/a.jsonl"})
    found = resolve(context, described)
    assert [row for _, row in rows(context, found)] == [{"x": 1}, {"x": 2}]
    put(f"{bucket}/a.jsonl", ROWS + b'{"x": 3}\n')
    with pytest.raises(Conflict, match=found.sha256):
        list(rows(context, found))


def test_storage_that_does_not_answer_is_unavailable(
    context: Context, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert isinstance(refused(changed(context, data_roots=[bucket]), f"{bucket}/a.jsonl"), Unavailable)


def test_google_storage_says_what_it_needs(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    context = changed(context, data_roots=["gs://bucket/data"])
    assert "Please install gcsfs" in refused(context, "gs://bucket/data/a.jsonl").message


# The internet


class Fetched(Fetcher):
    """Fetches from nowhere."""

    def fetch(self, url: str, into: BinaryIO, most: int) -> None:
        assert most == 65_536
        if "none" in url:
            raise BadInput(f"{url} answers with the status 404")
        into.write(ROWS)


def test_what_is_fetched_is_read_and_not_kept(context: Context, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_content, "FETCHER", Fetched())
    with opened(context, "https://example.org/deep/a%20b.jsonl?x=1") as content:
        assert (content.name, content.file.read()) == ("a b.jsonl", ROWS)
    described = {"columns": {"x": "number"}, "content_url": "https://example.org/a.jsonl"}
    assert check(context, TrainEvalDataset.model_validate(described)).rows == 2
    assert "404" in refused(context, "https://example.org/none.jsonl").message
    assert left_behind(home) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0x7f000001"])
def test_nothing_inside_is_fetched(context: Context, host: str) -> None:
    assert "may not be asked" in refused(context, f"https://{host}/a.jsonl").message


def test_a_copy_needs_room(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    monkeypatch.setattr(dataset_content, "FETCHER", Fetched())
    assert isinstance(refused(context, "https://example.org/a.jsonl"), StorageFull)
