"""Artifacts: all of one or nothing, under safe names, on local and on remote file systems."""

import errno
import hashlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from stack.artifacts import MANIFEST, Artifacts, File
from stack.errors import BadInput, NotFound

CONTENT = {"a.txt": b"one", "b.bin": bytes(range(256)), "deep/er/c.txt": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/artifacts"
        return
    root = f"/{uuid.uuid4().hex}"
    yield f"memory:/{root}"
    files = fsspec.filesystem("memory")
    if files.exists(root):
        files.rm(root, recursive=True)


@pytest.fixture
def artifacts(url: str, tmp_path: Path) -> Artifacts:
    return Artifacts(url, cache=tmp_path / "cache")


def stored(url: str) -> dict[str, bytes]:
    """All files under an address, by their names relative to it."""
    files, root = fsspec.core.url_to_fs(url)
    if not files.exists(root):
        return {}
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def fail_at(
    monkeypatch: pytest.MonkeyPatch, artifacts: Artifacts, method: str, call: int, error: BaseException
) -> None:
    """Makes a method of the file system fail at its nth call."""
    files = artifacts._files
    original = getattr(files, method)
    calls = iter(range(1, 1_000))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(files, method, failing)


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


def test_a_remote_artifact_is_copied_once_and_without_leftovers(tmp_path: Path, folder: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    artifacts = Artifacts(url, cache=tmp_path / "cache")
    artifacts.publish("a", folder)
    local = artifacts.local("a")
    assert local == tmp_path / "cache" / "a"
    assert sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()) == sorted(CONTENT)
    fsspec.filesystem("memory").pipe_file(f"{artifacts.url('a')}/a.txt", b"changed")
    assert (artifacts.local("a") / "a.txt").read_bytes() == b"one"


def test_a_copy_that_broke_off_is_made_whole(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")
    artifacts.publish("a", folder)
    fail_at(monkeypatch, artifacts, "get_file", 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        artifacts.local("a")
    local = artifacts.local("a")
    assert {name: (local / name).read_bytes() for name in CONTENT} == CONTENT


def test_an_empty_folder_is_an_artifact_too(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert artifacts.publish("a", tmp_path / "empty") == []
    assert artifacts.files("a") == []


def test_symbolic_links_are_left_out(artifacts: Artifacts, folder: Path) -> None:
    (folder / "passwords").symlink_to("/etc/passwd")
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
    fsspec.core.url_to_fs(url)[0].rm(f"{artifacts.url('a')}/{MANIFEST}")
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


@pytest.mark.parametrize(
    ("method", "call"),
    [("put_file", 1), ("put_file", 2), ("put_file", 3), ("mv", 1), ("pipe_file", 1), ("mv", 2)],
    ids=["first file", "second file", "last file", "moving the files", "writing the manifest", "moving the manifest"],
)
def test_a_publish_that_fails_leaves_nothing_and_can_be_repeated(
    artifacts: Artifacts, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    fail_at(monkeypatch, artifacts, method, call, OSError(errno.ENOSPC, "No space left on device"))
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
    fail_at(monkeypatch, artifacts, "put_file", 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        artifacts.publish("adapters/tune-2", folder)
    assert [file.name for file in artifacts.files("adapters/tune-1")] == sorted(CONTENT)


@pytest.mark.parametrize(("method", "call"), [("put_file", 2), ("mv", 1), ("pipe_file", 1), ("mv", 2)])
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


def test_a_remote_file_that_is_not_what_was_published_is_refused(tmp_path: Path, folder: Path) -> None:
    artifacts = Artifacts(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")
    artifacts.publish("a", folder)
    fsspec.filesystem("memory").pipe_file(f"{artifacts.url('a')}/b.bin", bytes(256))
    with pytest.raises(OSError, match=r"b\.bin of the artifact 'a' is not what was published"):
        artifacts.local("a")
    assert not list((tmp_path / "cache").rglob("b.bin*"))
