"""Every package is pinned, its licence is known, and an audit that was not done is not taken for a good one."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import audit, licenses
from stack.config import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CPU, GPU = audit.LOCKS


def pinned(lock: Path) -> dict[str, str]:
    """The versions of a lock file, by name, for this Python."""
    found = {}
    for line in lock.read_text().splitlines():
        if line.startswith("#"):
            continue
        pin, _, marker = (part.strip() for part in line.partition(";"))
        if not marker or Marker(marker).evaluate():
            name, _, of_it = pin.partition("==")
            assert name not in found, name
            found[name] = of_it
    return found


@pytest.mark.parametrize(("lock", "engine"), [(CPU, "cpu"), (GPU, "gpu")])
def test_what_the_project_asks_for_is_pinned_to_what_it_takes(lock: Path, engine: str) -> None:
    versions = pinned(lock)
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras[engine], *extras["gcs"], *extras["clouds"], *extras["dev"], "uv"):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == "torch":  # exactly, in pyproject.toml; which build of it is the set-up's choice
            assert str(requirement.specifier).startswith("==")
            continue
        assert requirement.specifier.contains(versions[name], prereleases=True), text


def test_all_that_is_installed_and_needed_is_installed_as_it_is_pinned() -> None:
    lock = pinned(GPU if any(package.name == "vllm" for package in licenses.needed()) else CPU)
    for package in licenses.needed():
        name = canonicalize_name(package.name)
        if name != "torch":
            assert lock[name] == package.version, name


@pytest.mark.parametrize("lock", audit.LOCKS, ids=lambda lock: lock.name)
def test_a_lock_holds_versions_and_no_place_to_get_them(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+]*( ; .+)?", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])


def test_the_set_up_takes_the_lock_of_what_it_sets_up() -> None:
    setup = (ROOT / "scripts" / "setup").read_text()
    assert '--constraint "$constraints"' in setup
    assert "scripts/constraints-$extra.txt" in setup


# Licences


def test_the_licence_of_every_package_is_known_and_may_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert licenses.main() == 0
    told = capsys.readouterr().out
    for name in ("ray", "transformers", "lancedb", "fastapi"):
        assert f"{name} {version(name)}" in told
    for name, of_it in pinned(GPU).items():
        assert name in pinned_names(CPU) or f"{name} {of_it}" in told, "what the image for GPUs has besides"
    assert "pytest" not in told, "tests are not needed to run it"


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("MIT", True),
        ("Apache Software License; MIT License", True),
        ("MPL-2.0 AND MIT", True),
        ("GPL-3.0-only OR Apache-2.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("Apache License, Version 2.0", True),
        ("mit or GPL-3.0", True),
        ("GPL-3.0-only", False),
        ("MIT and GPL-3", False),
        ("(MIT or GPL-3.0-only) AND GPL-3.0-only", False),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", True),
        ("BSD-3-Clause, GPL-3.0", False),
        ("Apache 2.0 with Commons Clause", False),
        ("MIT plus Non-Commercial", False),
        ("MIT AND GPL-2.0-only", False),
        ("GNU Affero General Public License v3", False),
        ("Other/Proprietary License", False),
        ("not said", False),
        ("", False),
    ],
)
def test_a_licence_that_asks_for_more_is_looked_at_first(text: str, free: bool) -> None:
    assert licenses.is_free(text) is free


def pinned_names(lock: Path) -> set[str]:
    return {line.partition("==")[0] for line in lock.read_text().splitlines() if not line.startswith("#")}


def test_what_only_gpus_need_is_in_the_list_of_licences_and_nothing_else() -> None:
    """None of these is installed here: the list is all that is known of them."""
    assert set(licenses.gpu_licences()) == pinned_names(GPU) - pinned_names(CPU)
    told = licenses.gpu_licences()
    assert told["vllm"] == "Apache-2.0"
    assert not licenses.is_free(told["nvidia-cublas"])


def test_a_pin_for_gpus_whose_licence_nobody_has_looked_at_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "constraints-gpu.txt"
    lock.write_text(GPU.read_text() + "somebody-elses==1.0\n")
    monkeypatch.setattr(licenses, "LOCKS", (CPU, lock))
    assert licenses.main() == 1
    assert "nobody has looked at the licence of somebody-elses: not said" in capsys.readouterr().err


def test_reviews_are_of_the_packages_that_they_name() -> None:
    assert licenses.review("psycopg-binary") == licenses.review("psycopg")
    assert licenses.review("nvidia-cublas")
    assert licenses.review("psy") is None
    assert licenses.review("somebody-elses") is None


# The audit

SAFE = {"name": "jinja2", "version": "3.1.6", "vulns": []}
HOLE = {"id": "PYSEC-2024-1", "aliases": ["CVE-2024-1"], "fix_versions": ["2.0"], "description": ""}
UNSAFE = {"name": "flask", "version": "1.0", "vulns": [HOLE]}
UNREAD = {"name": "flask", "skip_reason": "Dependency not found on PyPI and could not be audited: flask (1.0)"}
PINS = ["flask==1.0", "jinja2==3.1.6"]


def answer(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies, "fixes": []})


def test_a_vulnerable_version_is_named_with_what_mends_it() -> None:
    found = audit.findings(PINS, answer(SAFE, UNSAFE))
    assert (found.read, found.unread) == (2, [])
    assert found.vulnerable == ["flask 1.0: PYSEC-2024-1, mended in 2.0"]


def test_an_advisory_that_does_not_concern_us_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audit.ACCEPTED, "CVE-2024-1", "only with a debugger that is never started")
    assert audit.findings(PINS, answer(SAFE, UNSAFE)).vulnerable == []


@pytest.mark.parametrize("told", [answer(SAFE, UNREAD), answer(SAFE), "", "Traceback", "[]"])
def test_what_was_not_read_is_not_taken_for_well(told: str) -> None:
    found = audit.findings(PINS, told)
    assert "flask==1.0" in found.unread
    assert found.vulnerable == []


@pytest.mark.parametrize(
    ("told", "status", "words"),
    [
        (lambda pins: answer(*({"name": one.split("==")[0], "version": "1", "vulns": []} for one in pins)), 0, ""),
        (lambda pins: "", audit.NOT_DONE, "NOT DONE for"),
        (lambda pins: answer(UNSAFE), 1, "PYSEC-2024-1"),
    ],
    ids=["well", "not reached", "vulnerable"],
)
def test_the_end_tells_the_three_apart(
    told: Any, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "asked", told)
    assert audit.main() == status
    assert words in capsys.readouterr().err


def test_every_pin_is_asked_about_and_never_two_of_a_package_at_once() -> None:
    pins = audit.pins()
    assert any(one.startswith("torch==") for one in pins)
    assert set(pins) >= {f"{name}=={one}" for lock in audit.LOCKS for name, one in pinned(lock).items()}
    lists = audit.batches(pins)
    assert sorted(one for batch in lists for one in batch) == pins
    for batch in lists:
        names = [one.partition("==")[0] for one in batch]
        assert len(set(names)) == len(names)


def test_ci_says_when_the_audit_was_not_done() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "scripts.audit" in script
    assert "scripts.licenses" in (ROOT / "scripts" / "check").read_text()
