"""Artifacts: all of one or nothing, under safe names, in a local folder and in S3: a real server that speaks it."""

import datetime as dt
import errno
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs

from stack.artifacts import BLOCK, MANIFEST, Artifacts, File
from stack.copies import LATELY_S
from stack.errors import BadInput, NotFound, StorageFull, Unavailable
from tests.s3 import S3

CONTENT = {"a.txt": b"one", "b.bin": bytes(range(256)), "deep/er/c.txt": b""}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where artifacts are kept: a local folder, or a bucket of its own."""
    if request.param == "file":
        return f"file://{tmp_path}/artifacts"
    s3: S3 = request.getfixturevalue("s3")
    return s3.bucket()


@pytest.fixture
def artifacts(url: str, tmp_path: Path) -> Artifacts:
    return Artifacts(url, cache=tmp_path / "cache")


@pytest.fixture
def remote(s3: S3, tmp_path: Path) -> Artifacts:
    """Artifacts in S3, where a test is about those alone."""
    return Artifacts(s3.bucket(), cache=tmp_path / "cache")


def stored(url: str) -> dict[str, bytes]:
    """All files under an address, by their names relative to it."""
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    if not files.exists(root):
        return {}
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def write(url: str, content: bytes) -> None:
    files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    files.pipe_file(path, content)


def fail_at(
    monkeypatch: pytest.MonkeyPatch, artifacts: Artifacts, method: str, call: int, error: BaseException
) -> None:
    """Makes a method of the file system fail at its nth call. That of S3 puts and gets files by asynchronous ones."""
    files = artifacts._files
    numbers = iter(range(1, 1_000))

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*arguments: Any, **options: Any) -> Any:
            if next(numbers) == call:
                raise error
            return original(*arguments, **options)

        return fail

    if method == "rename":
        monkeypatch.setattr(os, method, failing(os.rename))
        return
    if files.async_impl and method in ("put_file", "get_file"):
        method = f"_{method}"
    monkeypatch.setattr(files, method, failing(getattr(files, method)))


def test_an_artifact_is_its_files_with_sizes_and_hashes(artifacts: Artifacts, folder: Path) -> None:
    expected = [File(name, len(CONTENT[name]), hashlib.sha256(CONTENT[name]).hexdigest()) for name in sorted(CONTENT)]
    assert artifacts.publish("adapters/tune-1", folder) == expected
    assert artifacts.files("adapters/tune-1") == expected


def test_the_files_lie_under_the_name_with_a_manifest_and_nothing_else(
    artifacts: Artifacts, url: str, folder: Path
) -> None:
    artifacts.publish("adapters/tune-1", folder)
    found = stored(url)
    manifest = json.loads(found.pop(f"adapters/tune-1/{MANIFEST}"))
    assert found == {f"adapters/tune-1/{name}": content for name, content in CONTENT.items()}
    assert [entry["name"] for entry in manifest] == sorted(CONTENT)


def test_local_gives_a_folder_to_read(artifacts: Artifacts, folder: Path) -> None:
    artifacts.publish("adapters/tune-1", folder)
    for _ in range(2):  # the second time from the cache, where there is one
        local = artifacts.local("adapters/tune-1")
        assert {name: (local / name).read_bytes() for name in CONTENT} == CONTENT


def test_an_address_leads_to_the_artifact(artifacts: Artifacts, url: str, folder: Path) -> None:
    artifacts.publish("a", folder)
    assert stored(artifacts.url("a"))["a.txt"] == b"one"
    assert artifacts.url("a").startswith(url.split(":")[0] + "://")


def test_a_local_artifact_is_not_copied(tmp_path: Path, folder: Path) -> None:
    artifacts = Artifacts(f"file://{tmp_path}/artifacts", cache=tmp_path / "cache")
    artifacts.publish("a", folder)
    assert artifacts.local("a") == tmp_path / "artifacts" / "a"
    assert not (tmp_path / "cache").exists()


def test_a_remote_artifact_is_copied_once_and_without_leftovers(
    remote: Artifacts, s3: S3, folder: Path, tmp_path: Path
) -> None:
    remote.publish("a", folder)
    local = remote.local("a")
    assert local.is_relative_to(tmp_path / "cache")
    assert sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()) == sorted(CONTENT)
    s3.requests.clear()
    assert remote.local("a") == local
    assert s3.requests["GET"] == 1, "only the manifest is to be read again"


def test_another_artifact_of_the_same_name_is_not_taken_for_the_one_in_the_cache(
    artifacts: Artifacts, folder: Path
) -> None:
    artifacts.publish("a", folder)
    artifacts.local("a")
    artifacts.remove("a")
    (folder / "a.txt").write_bytes(b"two")
    artifacts.publish("a", folder)
    assert (artifacts.local("a") / "a.txt").read_bytes() == b"two"


def test_a_copy_that_broke_off_is_made_whole(
    remote: Artifacts, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.publish("a", folder)
    fail_at(monkeypatch, remote, "get_file", 2, FULL)
    with pytest.raises(OSError, match="No space left"):
        remote.local("a")
    assert not list((tmp_path / "cache").rglob("*.part-*"))
    local = remote.local("a")
    assert {name: (local / name).read_bytes() for name in CONTENT} == CONTENT


def test_copies_are_bounded_and_made_again(s3: S3, folder: Path, tmp_path: Path) -> None:
    remote = Artifacts(s3.bucket(), cache=tmp_path / "cache", cache_bytes=1)
    for name in ("a", "b"):
        remote.publish(name, folder)
    first = remote.local("a")
    long_ago = time.time() - 2 * LATELY_S
    os.utime(first, (long_ago, long_ago))
    second = remote.local("b")
    assert second.exists(), "it was just asked for"
    assert not first.exists()
    assert (remote.local("a") / "a.txt").read_bytes() == b"one"


def test_a_copy_goes_with_its_artifact(remote: Artifacts, folder: Path) -> None:
    remote.publish("a", folder)
    local = remote.local("a")
    remote.remove("a")
    assert not local.exists()


def test_an_empty_folder_is_an_artifact_too(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert artifacts.publish("a", tmp_path / "empty") == []
    assert artifacts.files("a") == []


def test_symbolic_links_are_left_out(artifacts: Artifacts, folder: Path) -> None:
    (folder / "passwords").symlink_to("/etc/passwd")
    (folder / "everything").symlink_to("/etc")
    artifacts.publish("a", folder)
    assert [file.name for file in artifacts.files("a")] == sorted(CONTENT)


def test_what_is_not_there_is_not_found(artifacts: Artifacts, folder: Path) -> None:
    artifacts.publish("adapters/tune-1", folder)
    for name in ("none", "adapters", "adapters/tune-1/deep", "adapters/tune-11"):
        with pytest.raises(NotFound, match=f"there is no artifact '{name}'"):
            artifacts.files(name)
        with pytest.raises(NotFound):
            artifacts.local(name)


def test_without_its_manifest_an_artifact_is_not_there(artifacts: Artifacts, url: str, folder: Path) -> None:
    artifacts.publish("a", folder)
    fsspec.core.url_to_fs(url)[0].rm_file(f"{artifacts.url('a')}/{MANIFEST}")
    with pytest.raises(NotFound):
        artifacts.files("a")


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../a", "a/../b", "a/..", "a..b", "/a", "a//b", "a/", "~/a", "a b", "a\\b", "a\n", "a\0"),
        *(".part-1", "a/.b", "ä", "a:b", "s3://a", "a?b", "*"),
    ],
)
def test_unsafe_names_are_refused_everywhere(artifacts: Artifacts, url: str, folder: Path, name: str) -> None:
    with pytest.raises(BadInput, match="is no name of an artifact; allowed: letters, digits"):
        artifacts.publish(name, folder)
    for method in (artifacts.files, artifacts.local, artifacts.url, artifacts.exists, artifacts.remove):
        with pytest.raises(BadInput):
            method(name)
    assert stored(url) == {}


def test_a_name_is_given_once(artifacts: Artifacts, url: str, folder: Path) -> None:
    artifacts.publish("a", folder)
    before = stored(url)
    (folder / "a.txt").write_bytes(b"two")
    with pytest.raises(BadInput, match="there is an artifact 'a' already"):
        artifacts.publish("a", folder)
    assert stored(url) == before


# What a publication does, one after the other, where artifacts are kept.
STEPS = [
    *(("file", "put_file", 1), ("file", "put_file", 3), ("file", "rename", 1), ("file", "pipe_file", 1)),
    *(("file", "rename", 2), ("s3", "put_file", 1), ("s3", "put_file", 3), ("s3", "pipe_file", 1)),
]


@pytest.mark.parametrize(("url", "method", "call"), STEPS, indirect=["url"])
def test_a_publish_that_fails_leaves_nothing_and_can_be_repeated(
    artifacts: Artifacts, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    fail_at(monkeypatch, artifacts, method, call, FULL)
    with pytest.raises(OSError, match="No space left on device") as caught:
        artifacts.publish("adapters/tune-1", folder)
    assert caught.value.errno == errno.ENOSPC
    assert stored(url) == {}
    with pytest.raises(NotFound):
        artifacts.files("adapters/tune-1")
    artifacts.publish("adapters/tune-1", folder)
    assert [file.name for file in artifacts.files("adapters/tune-1")] == sorted(CONTENT)


def test_a_publish_that_fails_leaves_other_artifacts(
    artifacts: Artifacts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts.publish("adapters/tune-1", folder)
    fail_at(monkeypatch, artifacts, "put_file", 2, FULL)
    with pytest.raises(OSError, match="No space left"):
        artifacts.publish("adapters/tune-2", folder)
    assert [file.name for file in artifacts.files("adapters/tune-1")] == sorted(CONTENT)


# Those at which this process can be stopped from outside: files go to S3 in a thread of its client.
STOPS = [step for step in STEPS if step[:2] != ("s3", "put_file")]


@pytest.mark.parametrize(("url", "method", "call"), STOPS, indirect=["url"])
def test_the_manifest_comes_last(
    artifacts: Artifacts, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    """A process that is killed before its end leaves no artifact, and the next publish makes a whole one."""
    fail_at(monkeypatch, artifacts, method, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        artifacts.publish("a", folder)
    with pytest.raises(NotFound):
        artifacts.files("a")
    (folder / "a.txt").rename(folder / "other.txt")
    artifacts.publish("a", folder)
    assert artifacts.files("a")[-1].name == "other.txt"
    assert {name for name in stored(url) if name.startswith("a/")} == {
        *("a/b.bin", "a/deep/er/c.txt", "a/other.txt", f"a/{MANIFEST}")
    }


def test_a_file_named_like_the_manifest_does_not_pass_for_one(artifacts: Artifacts, folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(BadInput, match=MANIFEST):
        artifacts.publish("a", folder)
    with pytest.raises(NotFound):
        artifacts.files("a")


def test_an_artifact_exists_from_its_publication_to_its_removal(artifacts: Artifacts, url: str, folder: Path) -> None:
    assert not artifacts.exists("a")
    artifacts.publish("a", folder)
    artifacts.publish("b", folder)
    assert artifacts.exists("a")
    artifacts.remove("a")
    assert not artifacts.exists("a")
    assert artifacts.exists("b")
    assert not [name for name in stored(url) if name.startswith("a/")]
    artifacts.publish("a", folder)


def test_a_removal_that_breaks_off_leaves_no_artifact(
    artifacts: Artifacts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts.publish("a", folder)
    fail_at(monkeypatch, artifacts, "rm", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        artifacts.remove("a")
    assert not artifacts.exists("a")


def test_a_remote_file_that_is_not_what_was_published_is_refused(remote: Artifacts, folder: Path) -> None:
    remote.publish("a", folder)
    write(f"{remote.url('a')}/b.bin", bytes(256))
    with pytest.raises(OSError, match=r"b\.bin of the artifact 'a' is not what was published"):
        remote.local("a")


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "a/./b", "a//b", "a\0b", ".", ""])
def test_a_manifest_that_leads_elsewhere_is_refused(
    artifacts: Artifacts, tmp_path: Path, folder: Path, name: str
) -> None:
    """Others may write where artifacts are kept."""
    artifacts.publish("a", folder)
    write(f"{artifacts.url('a')}/{MANIFEST}", json.dumps([dict(name=name, bytes=1, sha256="")]).encode())
    with pytest.raises(OSError, match="the manifest of an artifact has a file named"):
        artifacts.files("a")
    with pytest.raises(OSError, match="the manifest"):
        artifacts.local("a")
    assert not (tmp_path / "out").exists()


def test_what_another_process_has_changed_is_seen(
    artifacts: Artifacts, url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)  # a client of its own, as in another process
    other = Artifacts(url, cache=tmp_path / "other")
    artifacts.publish("all/a", folder)
    assert artifacts.names("all") == ["all/a"]
    other.publish("all/b", folder)
    assert artifacts.names("all") == ["all/a", "all/b"]
    assert len(artifacts.files("all/b")) == len(CONTENT)
    other.remove("all/a")
    assert not artifacts.exists("all/a")
    artifacts.publish("all/a", folder)


def test_of_two_who_publish_a_name_at_once_one_does(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other comes between the first one's look at the name and its end."""
    first, other = (Artifacts(f"file://{tmp_path}/artifacts", cache=tmp_path / "cache") for _ in range(2))
    look = first._clear

    def look_and_wait(path: str) -> None:
        monkeypatch.undo()
        look(path)
        other.publish("a", folder)

    monkeypatch.setattr(first, "_clear", look_and_wait)
    with pytest.raises(OSError, match="not empty"):
        first.publish("a", folder)
    assert (first.local("a") / "a.txt").read_bytes() == b"one"
    assert os.listdir(tmp_path / "artifacts") == ["a"]


# Content in blocks


def test_content_comes_in_blocks(artifacts: Artifacts, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096 * 2 + b"end"
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "x").write_bytes(content)
    (file,) = artifacts.publish("a", tmp_path / "big")
    blocks = list(artifacts.blocks("a", file))
    assert [len(block) for block in blocks] == [BLOCK, BLOCK, 3]
    assert b"".join(blocks) == content


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 10), (255, 256), (10, 10), (0, 256), (200, None)])
def test_a_part_of_the_content(artifacts: Artifacts, folder: Path, start: int, stop: int | None) -> None:
    file = artifacts.publish("a", folder)[1]
    assert b"".join(artifacts.blocks("a", file, start, stop)) == CONTENT["b.bin"][start:stop]


def test_content_that_is_shorter_than_it_was_is_an_error(artifacts: Artifacts, folder: Path) -> None:
    file = artifacts.publish("a", folder)[1]
    write(f"{artifacts.url('a')}/b.bin", bytes(range(100)))
    with pytest.raises(OSError):  # noqa: PT011 - each storage has its own words
        list(artifacts.blocks("a", file))


def test_content_that_is_gone_is_not_found(artifacts: Artifacts, folder: Path) -> None:
    file = artifacts.publish("a", folder)[1]
    artifacts.remove("a")
    with pytest.raises(NotFound, match=r"'b\.bin' of the artifact 'a' is gone"):
        list(artifacts.blocks("a", file))


# Object storage


def test_a_file_takes_one_request_to_write_and_one_to_read(remote: Artifacts, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "many" / "deep").mkdir(parents=True)
    for number in range(200):
        (tmp_path / "many" / "deep" / f"{number}.txt").write_text(str(number))
    remote.publish("a", tmp_path / "many")
    assert s3.requests["PUT"] == 201
    assert s3.requests.total() - s3.requests["PUT"] < 10
    s3.requests.clear()
    remote.local("a")
    assert s3.requests["GET"] == 201
    assert s3.requests.total() - s3.requests["GET"] < 10
    s3.requests.clear()
    remote.remove("a")
    assert s3.requests.total() < 10


def test_a_block_takes_one_request(remote: Artifacts, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "x").write_bytes(bytes(3 * BLOCK))
    (file,) = remote.publish("a", tmp_path / "big")
    s3.requests.clear()
    assert sum(len(block) for block in remote.blocks("a", file, BLOCK // 2, 2 * BLOCK)) == 3 * BLOCK // 2
    assert s3.requests == Counter(GET=2)


def test_object_storage_that_does_not_answer_is_unavailable(
    remote: Artifacts, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = remote.publish("a", folder)[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)  # no client that looks for the other server
    away = Artifacts(remote.url("a").removesuffix("/a"), cache=tmp_path / "other")
    for ask in (
        lambda: away.files("a"),
        lambda: away.exists("a"),
        lambda: away.local("a"),
        lambda: away.publish("b", folder),
        lambda: away.remove("a"),
        lambda: list(away.blocks("a", file)),
    ):
        with pytest.raises(Unavailable, match="the storage of the artifacts does not answer"):
            ask()


def test_object_storage_has_no_bound_of_its_own(remote: Artifacts) -> None:
    remote.require_room(2**60)


def test_a_local_disk_must_have_the_room(tmp_path: Path) -> None:
    artifacts = Artifacts(f"file://{tmp_path}/artifacts", cache=tmp_path / "cache")
    artifacts.require_room(1)
    with pytest.raises(StorageFull, match=f"and {2**60} are needed"):
        artifacts.require_room(2**60)


@pytest.mark.parametrize("protocol", ["nonsense", "absent"])
def test_an_address_that_nothing_here_speaks_is_refused(protocol: str, tmp_path: Path) -> None:
    """One that is not known, and one whose package is not installed, as that of gs:// may be."""
    fsspec.register_implementation("absent", "no_such_package.Files", clobber=True)
    with pytest.raises(BadInput, match=f"artifacts cannot be kept at '{protocol}://bucket': "):
        Artifacts(f"{protocol}://bucket", cache=tmp_path).open()


# What interrupted publications leave


def test_names_are_those_right_under_a_folder(artifacts: Artifacts, folder: Path) -> None:
    assert artifacts.names("adapters") == []
    for name in ("adapters/b", "adapters/a", "others/c"):
        artifacts.publish(name, folder)
    assert artifacts.names("adapters") == ["adapters/a", "adapters/b"]


def test_only_what_is_old_is_removed(artifacts: Artifacts, folder: Path) -> None:
    artifacts.publish("a", folder)
    assert not artifacts.remove_if_older("a", dt.timedelta(hours=1))
    assert artifacts.exists("a")
    assert artifacts.remove_if_older("a", dt.timedelta(0))
    assert not artifacts.exists("a")


def test_old_temporary_names_are_removed(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(f"file://{tmp_path}/artifacts", cache=tmp_path / "cache")
    fail_at(monkeypatch, artifacts, "rename", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        artifacts.publish("a", folder)
    assert artifacts.remove_temporary(dt.timedelta(hours=1)) == 0
    assert os.listdir(tmp_path / "artifacts")
    assert artifacts.remove_temporary(dt.timedelta(0)) == 1
    assert not os.listdir(tmp_path / "artifacts")
