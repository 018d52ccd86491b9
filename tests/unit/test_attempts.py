"""What the supervisor's passes make of jobs, by a store on each database and a Ray that does as it is told."""

import json
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from sqlalchemy import event, update
from sqlalchemy.exc import OperationalError

from stack import jobs, made_datasets
from stack.api.datasets import TrainEvalDatasetColumnType
from stack.artifacts import Artifacts
from stack.config import ROOT, AutoscaledNodes, Config, home
from stack.context import Context
from stack.store import Job, Store
from stack.store.jobs import NewJob
from stack.store.schema import attempts as attempts_table
from stack.store.schema import clusters
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.attempts import LEASE_S, MARK, Attempts
    from serve_apps.scheduling import MAX_UNBEGUN

CONFIG = {"models": [{"id": "small", "path": "models/small", "context": 256}], "max_running_jobs": 10}
RAY = "127.0.0.1:6379"
CLUSTER = "session_1"
NODES = [{"CPU": 8.0}]
LONG_AGO = "2020-01-01T00:00:00.000Z"


@dataclass
class Ray:
    """Ray's jobs by their submission ids. What is in `errors` is raised instead of taking or telling of a job."""

    jobs: dict[str, JobDetails] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    away: Exception | None = None
    nodes: list[dict[str, float]] = field(default_factory=lambda: list(NODES))
    listed: Callable[[], None] = lambda: None
    connections: int = 0
    asked: int = 0

    def get_version(self) -> str:
        if self.away:
            raise self.away
        return "4"

    def list_jobs(self) -> list[JobDetails]:
        found = list(self.jobs.values())
        self.listed()
        return found

    def get_job_info(self, job_id: str) -> JobDetails:
        self.asked += 1
        if job_id in self.errors:
            raise self.errors[job_id]
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return self.jobs[job_id]

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        if submission_id in self.errors:
            raise self.errors[submission_id]
        self.add(submission_id, entrypoint=entrypoint, metadata=metadata, runtime_env=runtime_env)
        return submission_id

    def add(self, submission_id: str, **values: Any) -> None:
        given: dict[str, Any] = dict(entrypoint="", status=JobStatus.RUNNING, metadata={MARK: "x"})
        self.jobs[submission_id] = JobDetails(type=JobType.SUBMISSION, submission_id=submission_id, **given | values)

    def end(self, submission_id: str, status: JobStatus = JobStatus.FAILED, **values: Any) -> None:
        self.add(submission_id, status=status, **values)

    def kill(self, submission_id: str) -> None:
        self.end(submission_id, error_type="JOB_ENTRYPOINT_COMMAND_ERROR", driver_exit_code=-9, message="killed")


@dataclass
class Cluster:
    """A store, a Ray, and the supervisor between them."""

    store: Store
    ray: Ray
    config: Config
    time: float = 0.0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        def connect() -> Ray:
            self.ray.connections += 1
            return self.ray

        artifacts = Artifacts(self.config.artifacts_url, cache=home() / "cache")
        self.context = Context(self.config, self.store, artifacts, ScriptedEngine())
        nodes, clock = lambda: self.ray.nodes, lambda: self.time
        self._attempts = Attempts(self.config, self.store, connect, lambda: RAY, CLUSTER, nodes, self._forget, clock)

    def _forget(self, job: Job) -> None:
        made_datasets.forget(self.context.of_tenant(job.tenant), job)

    def limit(self, **changes: Any) -> None:
        self.config = self.config.model_copy(update=changes)
        self.restart()

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self._attempts.reconcile()

    def wait(self) -> None:
        """Lets so much time pass that every job may be tried again."""
        with self.store.engine.begin() as connection:
            ended = attempts_table.c.ended_at.is_not(None)
            connection.execute(update(attempts_table).where(ended).values(ended_at=LONG_AGO))

    def add(self, uuid: str = "job", tenant: str = "default", kind: str = jobs.EVALUATE, **changes: Any) -> Job:
        job, _ = self.store.jobs.add(NewJob(tenant, uuid, kind, {"job_uuid": uuid}, kind, **changes), max_waiting=1_000)
        assert job is not None
        return job

    def get(self, uuid: str = "job", tenant: str = "default") -> Job:
        job = self.store.jobs.get(tenant, uuid)
        assert job is not None
        return job

    def begin(self, uuid: str = "job", number: int = 1) -> Path:
        """Lets the driver of an attempt begin, and returns the folder that it works in."""
        assert self.store.jobs.begin(self.get(uuid).id, number, {})
        folder = jobs.work_folder("default", uuid)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def reasons(self, uuid: str = "job") -> list[str | None]:
        """Why each attempt ended, None for one that has not."""
        return [attempt.exit_reason for attempt in self.store.jobs.attempts(self.get(uuid).id)]

    def open(self) -> list[str]:
        return [attempt.submission_id for _, attempt in self.store.jobs.under_way()]


@pytest.fixture
def cluster(store: Store, home: Path) -> Cluster:
    return Cluster(store, Ray(), Config.parse(CONFIG, "config"))


# Starting


def test_a_waiting_job_is_handed_to_ray_once(cluster: Cluster) -> None:
    cluster.add("job", "acme")
    cluster.look(3)
    (submitted,) = cluster.ray.jobs.values()
    assert submitted.submission_id == "acme.job.1"
    assert submitted.metadata == {MARK: "job"}
    wanted = ["-m", "jobs.evaluate", "--tenant", "acme", "--job", "job", "--attempt", "1"]
    env, address, _, *arguments = shlex.split(submitted.entrypoint)
    assert (env, address, arguments) == ("env", f"RAY_ADDRESS={RAY}", wanted)
    assert cluster.ray.connections == 1


def test_a_driver_runs_the_code_of_its_supervisor(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/opt/packages")
    cluster.add("job", "acme")
    cluster.look()
    (submitted,) = cluster.ray.jobs.values()
    assert submitted.runtime_env["env_vars"]["PYTHONPATH"] == f"{ROOT}:/opt/packages"


def test_a_new_supervisor_goes_on_with_what_is_under_way(cluster: Cluster) -> None:
    cluster.add()
    cluster.look()
    cluster.begin()
    cluster.restart()
    cluster.look(2)
    assert (list(cluster.ray.jobs), cluster.ray.stopped, cluster.reasons()) == (["default.job.1"], [], [None])


def test_one_tenants_many_jobs_do_not_keep_others_from_their_turns(cluster: Cluster) -> None:
    cluster.limit(max_running_jobs=2)
    for number in range(10):
        cluster.add(f"a-{number}", "a")
        cluster.add(f"b-{number}", "b")
    cluster.add("c", "c")
    started: list[str] = []
    for number in range(12):
        cluster.look()
        under_way = [submission_id for submission_id in cluster.open() if submission_id not in started]
        started += under_way
        job, attempt = cluster.store.jobs.under_way()[number % 2]
        assert cluster.store.jobs.begin(job.id, attempt.number, {})
        assert cluster.store.jobs.complete(job.id, attempt.number, {})
        if number == 5:
            cluster.restart()
    assert "c.c.1" in started[:4]
    assert abs(sum(one.startswith("a.") for one in started) - sum(one.startswith("b.") for one in started)) <= 1


def test_after_a_restart_the_turn_is_not_that_of_who_is_running(cluster: Cluster) -> None:
    cluster.limit(max_running_jobs=1)
    for number in range(3):
        cluster.add(f"a-{number}", "a")
    cluster.look()
    cluster.add("b", "b")
    cluster.restart()
    cluster.look()
    ((job, attempt),) = cluster.store.jobs.under_way()
    assert cluster.store.jobs.complete(job.id, attempt.number, {})
    cluster.look()
    assert cluster.open() == ["b.b.1"]


def test_what_a_job_waits_for_is_said_until_it_has_come(cluster: Cluster) -> None:
    cluster.limit(max_running_jobs=1)
    cluster.add("first")
    cluster.add("large", bundles=[{"GPU": 16.0}])
    cluster.look()
    assert cluster.get("large").waiting_for == "no node has 16 GPU; the largest of each: 0 GPU"
    cluster.ray.nodes.append({"GPU": 16.0})
    cluster.look()
    assert cluster.get("large").waiting_for is None, "it waits for its turn now"


def test_a_job_is_handed_to_ray_where_the_autoscaler_would_start_nodes_for_it(cluster: Cluster) -> None:
    cluster.add("large", bundles=[{"GPU": 8.0}, {"GPU": 8.0}])
    cluster.look()
    assert cluster.open() == []
    cluster.limit(autoscaled_nodes=[AutoscaledNodes(resources={"GPU": 8}, most=2)])
    cluster.look()
    assert cluster.open() == ["default.large.1"]


def test_that_a_job_waits_for_another_attempt_stays_said(cluster: Cluster) -> None:
    cluster.add()
    cluster.look()
    cluster.begin()
    cluster.ray.kill("default.job.1")
    cluster.look(2)
    assert "the last one was lost: failed: killed" in (cluster.get().waiting_for or "")


# Submissions that fail


def test_a_submission_that_fails_holds_up_no_other(cluster: Cluster) -> None:
    taken = "Request failed with status code 500: Traceback:\n ...\nValueError: default.bad.1 is taken."
    cluster.ray.errors["default.bad.1"] = RuntimeError(taken)
    cluster.add("bad")
    cluster.add("good")
    cluster.look()
    assert cluster.open() == ["default.good.1"]
    assert cluster.reasons("bad") == ["it could not be handed to Ray (ValueError: default.bad.1 is taken)"]
    cluster.wait()
    cluster.look()
    assert cluster.open() == ["default.bad.2", "default.good.1"]
    assert cluster.ray.connections == 1


def test_attempts_that_never_begin_are_bounded(cluster: Cluster) -> None:
    cluster.add()
    for number in range(1, MAX_UNBEGUN + 5):
        cluster.ray.errors[f"default.job.{number}"] = RuntimeError("Request failed with status code 500: no.")
        cluster.look()
        cluster.wait()
    assert cluster.get().status == "failed"
    assert cluster.get().error == (
        f"lost {MAX_UNBEGUN} times, at last: it could not be handed to Ray (Request failed with status code 500: no)"
    )
    assert len(cluster.reasons()) == MAX_UNBEGUN


def test_while_ray_is_away_no_attempts_are_used_up(cluster: Cluster) -> None:
    cluster.add()
    cluster.ray.away = ConnectionError("Ray is away")
    for _ in range(MAX_UNBEGUN + 1):
        with pytest.raises(ConnectionError):
            cluster.look()
    assert cluster.reasons() == []
    cluster.ray.away = None
    cluster.look()
    assert cluster.open() == ["default.job.1"]


def test_ray_going_away_at_a_submission_is_told_and_the_job_tried_again(cluster: Cluster) -> None:
    cluster.add()
    cluster.ray.errors["default.job.1"] = ConnectionError("reset by peer")
    with pytest.raises(ConnectionError):
        cluster.look()
    assert cluster.reasons() == ["it could not be handed to Ray (Ray does not answer)"]
    cluster.wait()
    cluster.look()
    assert cluster.open() == ["default.job.2"]
    assert cluster.ray.connections == 2


def test_a_job_that_nothing_runs_fails_with_the_reason_and_others_go_on(cluster: Cluster) -> None:
    cluster.add("strange", kind="bake")
    cluster.add("good")
    cluster.look(2)
    assert cluster.get("strange").status == "failed"
    assert "there is no driver for jobs of the kind 'bake'" in (cluster.get("strange").error or "")
    assert cluster.open() == ["default.good.1"]


# Attempts that end without saying how


@pytest.mark.parametrize(
    "ended",
    [
        dict(status=JobStatus.STOPPED, message="stopped by somebody"),
        dict(error_type="JOB_ENTRYPOINT_COMMAND_ERROR", driver_exit_code=-9),
        dict(error_type="JOB_ENTRYPOINT_COMMAND_ERROR", driver_exit_code=75),
        dict(error_type="JOB_ENTRYPOINT_COMMAND_ERROR", driver_exit_code=143),
        dict(error_type="JOB_SUPERVISOR_ACTOR_DIED"),
    ],
    ids=["stopped", "killed", "without the database", "terminated", "node gone"],
)
def test_a_lost_attempt_is_followed_by_another(cluster: Cluster, ended: dict[str, Any]) -> None:
    cluster.add()
    cluster.look()
    folder = cluster.begin()
    cluster.ray.end("default.job.1", **ended)
    cluster.look()
    assert (cluster.get().status, cluster.open()) == ("scheduled", []), "not at once"
    assert folder.is_dir(), "the next one goes on from there"
    cluster.wait()
    cluster.look()
    assert cluster.open() == ["default.job.2"]
    job = cluster.get()
    assert "attempt 1 was lost" in cluster.store.telemetry.logs_after("default", job.run_id, 0, 9)[0].message


def test_a_job_that_was_lost_too_often_is_given_up(cluster: Cluster) -> None:
    cluster.limit(max_retries=2)
    cluster.add()
    for number in (1, 2, 3):
        assert cluster.get().status == "scheduled"
        cluster.look()
        folder = cluster.begin(number=number)
        cluster.ray.kill(f"default.job.{number}")
        cluster.look()
        cluster.wait()
    cluster.look()
    assert (cluster.get().status, cluster.get().error) == ("failed", "lost 3 times, at last: failed: killed")
    assert not folder.exists()
    assert len(cluster.ray.jobs) == 3


def test_a_job_that_gets_further_with_each_attempt_is_not_given_up(cluster: Cluster) -> None:
    cluster.limit(max_retries=1)
    job = cluster.add()
    for number, done in enumerate((1, 2, 3, 4, 5, 5), 1):
        assert cluster.get().status == "scheduled"
        cluster.look()
        cluster.begin(number=number)
        progress = {"done": done, "total": 9, "unit": "rows", "seconds_left": None}
        assert cluster.store.jobs.record(job.id, number, progress=progress)
        cluster.ray.kill(f"default.job.{number}")
        cluster.look()
        cluster.wait()
    cluster.look()
    assert (cluster.get().status, cluster.get().error) == ("failed", "lost 6 times, at last: failed: killed")


def test_a_job_is_given_up_though_all_places_are_taken(cluster: Cluster) -> None:
    cluster.limit(max_running_jobs=1, max_retries=0)
    cluster.add("lost")
    cluster.look()
    cluster.begin("lost")
    cluster.ray.kill("default.lost.1")
    cluster.add("other")
    cluster.look(2)
    assert cluster.get("lost").status == "failed"
    assert cluster.open() == ["default.other.1"]


@pytest.mark.parametrize(
    "ended",
    [
        dict(
            error_type="JOB_ENTRYPOINT_COMMAND_ERROR", driver_exit_code=1, message="exit code 1, last available logs …"
        ),
        dict(status=JobStatus.SUCCEEDED, message="exit code 0"),
    ],
    ids=["error", "success"],
)
def test_a_driver_that_ends_by_itself_without_a_result_fails_the_job(cluster: Cluster, ended: dict[str, Any]) -> None:
    cluster.add()
    cluster.look()
    folder = cluster.begin()
    cluster.ray.end("default.job.1", **ended)
    cluster.look()
    assert cluster.get().status == "failed"
    assert (cluster.get().error or "").startswith("its driver ended without a result (")
    assert "last available logs" not in (cluster.get().error or "")
    assert not folder.exists()


def test_a_driver_that_has_written_its_outcome_is_believed(cluster: Cluster) -> None:
    """Between the look at the rows and the one at Ray."""
    job = cluster.add()
    cluster.look()
    cluster.begin()
    told = cluster.ray.get_job_info

    def complete_first(job_id: str) -> JobDetails:
        assert cluster.store.jobs.complete(job.id, 1, {"x": 1})
        cluster.ray.kill(job_id)
        return told(job_id)

    cluster.ray.get_job_info = complete_first  # type: ignore[method-assign]
    cluster.look()
    assert (cluster.get().status, cluster.get().result) == ("completed", {"x": 1})


def test_an_attempt_that_ray_does_not_know_is_lost_when_it_has_been_silent_for_long(cluster: Cluster) -> None:
    job = cluster.add()
    cluster.look()
    cluster.begin()
    cluster.ray.jobs.clear()  # Ray was started anew
    for _ in range(3):
        cluster.look()
        cluster.time += LEASE_S - 1
        assert cluster.store.jobs.beat(job.id, 1), "its driver lives on"
    cluster.look()
    cluster.time += LEASE_S - 1
    cluster.look()
    assert cluster.open() == ["default.job.1"]
    cluster.time += 1
    cluster.look()
    assert cluster.reasons() == ["its Ray job is gone: Ray was started anew while it ran"]
    cluster.wait()
    cluster.look()
    assert cluster.open() == ["default.job.2"]


def test_an_attempt_that_waits_in_another_living_cluster_is_not_lost(cluster: Cluster) -> None:
    """Its driver may begin late, as what it needs is used by others there."""
    job = cluster.add()
    cluster.store.clusters.tell(CLUSTER)
    cluster.store.clusters.tell("session_0")
    assert cluster.store.jobs.open_attempt(job.id, 1, "default.job.1", "session_0")
    for _ in range(3):
        cluster.look()
        cluster.time += LEASE_S
    assert cluster.open() == ["default.job.1"]
    with cluster.store.engine.begin() as connection:  # it says nothing more
        connection.execute(update(clusters).where(clusters.c.id == "session_0").values(told_at=LONG_AGO))
    cluster.look()
    assert cluster.reasons() == ["its Ray job is gone: Ray was started anew while it ran"]
    cluster.wait()
    cluster.look()
    assert cluster.open() == ["default.job.2"]


def test_an_attempt_of_this_cluster_that_ray_does_not_know_is_lost(cluster: Cluster) -> None:
    cluster.add()
    cluster.store.clusters.tell(CLUSTER)
    cluster.look()
    cluster.ray.jobs.clear()
    cluster.look()
    cluster.time += LEASE_S
    cluster.look()
    assert cluster.reasons() == ["its Ray job is gone: Ray was started anew while it ran"]


def test_an_error_of_ray_about_one_attempt_is_told_and_holds_up_no_other(cluster: Cluster) -> None:
    """An id with these digits is not an answer that there is no such job."""
    cluster.add("job-404")
    cluster.look()
    cluster.add("other")
    cluster.ray.errors["default.job-404.1"] = RuntimeError("Request failed with status code 500: default.job-404.1")
    with pytest.raises(RuntimeError, match="500"):
        cluster.look()
    assert cluster.open() == ["default.job-404.1", "default.other.1"]


# Cancelling


def test_cancelling_stops_the_ray_job_and_clears_up(cluster: Cluster) -> None:
    cluster.add()
    cluster.look()
    folder = cluster.begin()
    cluster.store.jobs.cancel("default", "job")
    cluster.look()
    assert (cluster.ray.stopped, cluster.get().status) == (["default.job.1"], "running")
    cluster.ray.end("default.job.1", JobStatus.STOPPED)
    cluster.look()
    assert (cluster.get().status, cluster.reasons()) == ("cancelled", ["it was stopped"])
    assert not folder.exists()


def test_a_job_to_be_cancelled_whose_ray_job_is_gone_is_cancelled(cluster: Cluster) -> None:
    cluster.add()
    cluster.look()
    folder = cluster.begin()
    cluster.ray.jobs.clear()
    cluster.store.jobs.cancel("default", "job")
    cluster.look()
    cluster.time += LEASE_S
    cluster.look()
    assert cluster.get().status == "cancelled"
    assert not folder.exists()
    assert cluster.store.jobs.waiting() == []


@pytest.mark.parametrize("end", ["cancelled", "cancelled, and lost", "without a result", "lost too often"])
def test_the_data_sets_of_a_job_without_a_result_are_removed_and_no_others(
    cluster: Cluster, home: Path, end: str
) -> None:
    """Its driver was killed right before the job was completed."""
    cluster.limit(max_retries=0)
    for uuid in ("job", "other"):
        cluster.add(uuid, kind=jobs.GENERATE)
        file, columns = home / f"{uuid}.jsonl", {"text": TrainEvalDatasetColumnType.text}
        file.write_text(json.dumps({"text": uuid}) + "\n")
        made_datasets.register(cluster.context, uuid, file, columns, {"job_uuid": uuid})
    cluster.look()
    cluster.begin()
    if end.startswith("cancelled"):
        cluster.store.jobs.cancel("default", "job")
    if end.endswith("lost"):
        cluster.ray.jobs.pop("default.job.1")
        cluster.look()
        cluster.time += LEASE_S
    elif end == "without a result":
        cluster.ray.end("default.job.1", JobStatus.SUCCEEDED)
    else:
        cluster.ray.kill("default.job.1")
    cluster.look(2)
    assert cluster.get().status == ("cancelled" if end.startswith("cancelled") else "failed")
    assert cluster.store.datasets.get("default", "job") is None
    assert cluster.store.datasets.get("default", "other") is not None


# Ray jobs that no attempt stands for


def test_strays_are_stopped_and_nothing_else_is(cluster: Cluster) -> None:
    cluster.add()
    cluster.look()
    cluster.ray.add("default.gone.1")
    cluster.ray.end("default.ended.1")
    cluster.ray.add("raysubmit_1", metadata={})
    cluster.restart()
    cluster.look()
    assert cluster.ray.stopped == ["default.gone.1"]


def test_a_ray_job_whose_row_was_written_meanwhile_is_no_stray(cluster: Cluster) -> None:
    """The supervisor before this one may still be at work: whatever it does falls between the two looks."""
    job = cluster.add()

    def submit() -> None:
        assert cluster.store.jobs.open_attempt(job.id, 1, "default.job.1")
        cluster.ray.add("default.job.1")

    def submit_before_the_first_look(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "attempts" in statement:
            cluster.ray.listed()

    cluster.ray.listed = once(submit)
    event.listen(cluster.store.engine, "after_cursor_execute", submit_before_the_first_look)
    cluster.look()
    event.remove(cluster.store.engine, "after_cursor_execute", submit_before_the_first_look)
    assert cluster.open() == ["default.job.1"]
    assert cluster.ray.stopped == []


def once(do: Callable[[], None]) -> Callable[[], None]:
    left = [do]
    return lambda: left.pop()() if left else None


# What a pass costs, and what it survives


def test_a_pass_goes_on_when_the_database_is_back(cluster: Cluster) -> None:
    cluster.add()

    def fail(*_: Any) -> None:
        raise OperationalError("SELECT", {}, OSError("away"))

    event.listen(cluster.store.engine, "before_cursor_execute", fail)
    with pytest.raises(OperationalError):
        cluster.look()
    event.remove(cluster.store.engine, "before_cursor_execute", fail)
    cluster.look()
    assert cluster.open() == ["default.job.1"]


def test_a_pass_asks_as_much_however_many_jobs_have_ended(cluster: Cluster) -> None:
    """And of Ray only about attempts under way."""

    def ended(count: int) -> None:
        for number in range(count):
            job = cluster.add(f"ended-{count}-{number}")
            assert cluster.store.jobs.open_attempt(job.id, 1, f"s-{job.uuid}")
            assert cluster.store.jobs.complete(job.id, 1, {})

    def asked() -> tuple[int, int]:
        statements: list[str] = []

        def note(_: Any, __: Any, statement: str, *___: Any) -> None:
            statements.append(statement)

        event.listen(cluster.store.engine, "before_cursor_execute", note)
        before = cluster.ray.asked
        cluster.look()
        event.remove(cluster.store.engine, "before_cursor_execute", note)
        return len(statements), cluster.ray.asked - before

    cluster.limit(max_running_jobs=1)
    cluster.add("running")
    cluster.look()
    cluster.add("waiting")
    ended(1)
    few = asked()
    ended(30)
    assert asked() == few
    assert few[1] == 1
