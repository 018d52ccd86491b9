"""What every driver does around its work: finding its job, taking it, and writing down how it ended."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import driver
from stack import jobs
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.context import Context
from tests import samples
from tests.driven import ATTEMPT, accepted, job, outcome
from tests.samples import evaluation


def test_a_request_from_a_file_becomes_a_job_and_is_completed(
    context: Context, run: Callable[..., int], config: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        seen.append((request.job_uuid, job(given.context).status))
        return outcome(given, {"files": [], "path": "file:///a"})

    assert run("--config", config, work=work) == 0
    assert seen == [("evaluation-1", "running")]
    done = job(context)
    assert done.status == "completed"
    assert [one.submission_id for one in context.store.jobs.attempts(done.id)] == ["raysubmit_1"]
    asked = evaluation(data | {"sha256": done.request["dataset"]["sha256"]})
    assert done.request == EvaluateQuestionAnsweringRequest.model_validate(asked).model_dump(mode="json")
    assert done.result == {"files": [], "path": "file:///a"}
    assert "'evaluation-1' is completed" in capsys.readouterr().out


def test_a_file_may_be_json_and_wrapped(
    context: Context, run: Callable[..., int], tmp_path: Path, data: dict[str, Any]
) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"request": evaluation(data)}))
    assert run("--config", file) == 0
    assert job(context).status == "completed"


def test_a_model_that_the_work_has_made_is_added(
    context: Context, run: Callable[..., int], data: dict[str, Any]
) -> None:
    accepted(context, data)
    model = samples.trained("small-evaluation-1")

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        return replace(outcome(given, {"files": [], "path": "file:///a"}), model=model)

    assert run(*ATTEMPT, work=work) == 0
    assert job(context).status == "completed"
    assert context.store.models.list() == [model]


def test_a_job_that_the_gateway_has_accepted_is_found_by_its_uuid(
    context: Context, run: Callable[..., int], data: dict[str, Any]
) -> None:
    accepted(context, data)
    assert run(*ATTEMPT) == 0
    assert job(context).status == "completed"


def test_a_job_without_room_any_more_fails_before_it_begins(
    context: Context, run: Callable[..., int], data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted(context, data)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert run(*ATTEMPT, work=None) == 2
    assert (job(context).status, job(context).started_at) == ("failed", None)
    assert "100 bytes left" in (job(context).error or "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"job_uuid: [", "is not YAML"),
        (b"\xff\xfe\x00\x01", "is not YAML"),
        (b"", "dictionary"),
        (b"- a\n- b\n", "dictionary"),
        (b"job_uid: a", "unknown key 'job_uid'; allowed: job_uuid, dataset"),
        (b"job_uuid: a", "dataset: is required"),
        (b"{job_uuid: a, dataset: b, checkpoint: small, sampling_params: {}, metrics: [bleu]}", "'em' or 'f1'"),
        (b"{job_uuid: a, dataset: none, checkpoint: small, sampling_params: {}, metrics: [em]}", "'none'"),
        (b"{job_uuid: a, dataset: none, checkpoint: big, sampling_params: {}, metrics: [em]}", "there are: small"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason_and_makes_no_job(
    context: Context,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    words: str,
) -> None:
    file = tmp_path / "request.yaml"
    file.write_bytes(content)
    assert run("--config", file) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("refused: ")
    assert words in printed
    assert printed.count("\n") == 1
    assert context.store.jobs.page("default", [jobs.EVALUATE]) == []


def test_a_missing_file_is_refused(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", tmp_path / "none.yaml") == 2
    assert f"{tmp_path}/none.yaml cannot be read: {os.strerror(errno.ENOENT)}" in capsys.readouterr().err


def test_an_unknown_job_is_refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--job", "none", "--attempt", "1") == 2
    assert "there is no job 'none' of the tenant 'default'" in capsys.readouterr().err


@pytest.mark.parametrize("tenant", ["../acme", "a.b", ""])
def test_what_can_be_no_tenant_is_refused(
    run: Callable[..., int], config: Path, tenant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", config, "--tenant", tenant) == 2
    assert f"not {tenant!r}" in capsys.readouterr().err


def test_a_wrong_config_of_the_stack_is_refused(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_CONFIG", '{"models": []}')
    assert run(*ATTEMPT) == 2
    assert "refused: STACK_CONFIG: models" in capsys.readouterr().err


def test_a_file_outside_of_a_ray_job_is_refused(
    context: Context,
    run: Callable[..., int],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert run("--config", config) == 2
    assert "ray job submit" in capsys.readouterr().err
    assert context.store.jobs.page("default", [jobs.EVALUATE]) == []


@pytest.mark.parametrize("arguments", [[], ["--job", "a", "--config", "b"], ["--uuid", "a"]])
def test_other_arguments_are_refused(
    run: Callable[..., int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["running", "completed", "failed"])
def test_a_job_that_is_not_waiting_is_left_alone(
    context: Context, run: Callable[..., int], data: dict[str, Any], capsys: pytest.CaptureFixture[str], end: str
) -> None:
    job_id = accepted(context, data).id
    context.store.jobs.begin(job_id, 1, {})
    if end == "failed":
        context.store.jobs.fail(job_id, 1, "before")
    elif end == "completed":
        context.store.jobs.complete(job_id, 1, {"path": None, "files": []})
    before = job(context)

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        raise AssertionError("it must not run")

    assert run(*ATTEMPT, work=work) == (1 if end == "failed" else 0)
    assert job(context) == before
    assert f"is {end} already" in capsys.readouterr().out


def test_what_a_job_prints_is_its_log(context: Context, run: Callable[..., int], data: dict[str, Any]) -> None:
    accepted(context, data)

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        os.write(1, b"half of it\n")  # as print does, but where the test runner has put its own in place
        subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
        return outcome(given, {"path": None, "files": []})

    assert run(*ATTEMPT, work=work) == 0
    lines = jobs.logs(context, "evaluation-1", [jobs.EVALUATE])
    assert ("info", "half of it") in [(line.level, line.message) for line in lines]
    assert ("warning", "from a child") in [(line.level, line.message) for line in lines]


def test_an_accepted_request_that_is_right_no_more_fails_the_job_with_the_reason(
    context: Context, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A release may know other fields than the one that accepted the job."""
    job = samples.add_job(context.store, "old", checkpoint="small")
    assert context.store.jobs.open_attempt(job.id, 1, "default.old.1")
    assert run("--job", "old", "--attempt", "1") == 2
    assert "dataset: is required" in capsys.readouterr().err
    now = context.store.jobs.get("default", "old")
    assert now is not None
    assert now.status == "failed"
    assert "dataset: is required" in (now.error or "")
