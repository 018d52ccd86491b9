"""What a running job writes down: its figures, its log, its heartbeat."""

import os
import threading
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from jobs import reporter
from jobs.reporter import Metrics, Reporter, steadily
from serve_apps.attempts import LEASE_S
from stack.errors import Unavailable
from stack.store import Attempt, Job, Store
from stack.store.connection import BUSY_S
from tests import samples


@pytest.fixture
def job(store: Store) -> Job:
    samples.add_job(store, "job-1")
    return samples.start(store, "job-1")


def away() -> OperationalError:
    return OperationalError("", {}, Exception("could not connect"))


def never(*_: Any, **__: Any) -> bool:
    raise away()


def messages(store: Store, job: Job) -> list[str]:
    return [line.message for line in store.telemetry.logs_after("default", job.run_id, 0, 100)]


def attempt(store: Store, job: Job) -> Attempt:
    return store.jobs.attempts(job.id)[-1]


def test_figures_are_written_in_their_order_and_all_of_them(store: Store, job: Job) -> None:
    with Metrics(store, job, 1) as metrics:
        for step in range(12_000):
            metrics.log(step, [("loss", float(step))])
        metrics.progress(12_000, 12_000, "steps")
    written = store.telemetry.metrics("default", job.run_id, max_points=20_000)
    assert [metric.value for metric in written] == [float(step) for step in range(12_000)]
    after = store.jobs.get("default", "job-1")
    assert after is not None
    assert after.progress == {"done": 12_000, "total": 12_000, "unit": "steps", "seconds_left": None}


def test_figures_outlast_a_database_that_is_away_for_a_while(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, tries = store.telemetry.add_metrics, []

    def busy_twice(*given: Any) -> bool:
        tries.append(given)
        if len(tries) <= 2:
            raise away()
        return add(*given)

    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    monkeypatch.setattr(store.telemetry, "add_metrics", busy_twice)
    with Metrics(store, job, 1) as metrics:
        metrics.log(1, [("loss", 2.0)])
        ended = threading.Event()
        while len(tries) < 3:
            assert not ended.wait(0.01)
    assert [metric.value for metric in store.telemetry.metrics("default", job.run_id)] == [2.0]


def test_a_heartbeat_is_shown_while_the_driver_lives(store: Store, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    monkeypatch.setattr(reporter, "BEAT_S", 0.02)
    waiting = threading.Event()
    with Reporter(store, job, attempt(store, job), lost=pytest.fail):
        while attempt(store, job).heartbeat < 4:
            assert not waiting.wait(0.01)


def test_a_driver_whose_attempt_was_given_up_is_told(store: Store, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    monkeypatch.setattr(reporter, "BEAT_S", 0.02)
    told: list[str] = []
    heard = threading.Event()

    def lost(why: str) -> None:
        told.append(why)
        heard.set()

    with Reporter(store, job, attempt(store, job), lost=lost):
        assert store.jobs.lose_attempt(job.id, 1, "its node was cut off")
        assert heard.wait(10)
    assert "given up" in told[0]


def test_a_driver_without_a_database_takes_itself_for_lost(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WRITE_S", 0.01), ("BEAT_S", 0.0), ("LIFE_S", 0.1)):
        monkeypatch.setattr(reporter, name, value)
    heard = threading.Event()

    mine = attempt(store, job)
    monkeypatch.setattr(store.jobs, "beat", never)
    with Reporter(store, job, mine, lost=lambda _: heard.set()):
        assert heard.wait(10)


def test_a_driver_whose_database_never_answers_takes_itself_for_lost(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that a network has swallowed raises nothing for a long time."""
    for name, value in (("WRITE_S", 0.01), ("BEAT_S", 0.0), ("LIFE_S", 0.1)):
        monkeypatch.setattr(reporter, name, value)
    heard = threading.Event()

    def hangs(*_: Any) -> bool:
        return heard.wait(10)

    mine = attempt(store, job)
    monkeypatch.setattr(store.jobs, "beat", hangs)
    with Reporter(store, job, mine, lost=lambda _: heard.set()):
        assert heard.wait(10)


def test_a_log_that_cannot_be_written_costs_no_heartbeat(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    monkeypatch.setattr(reporter, "BEAT_S", 0.02)
    waiting = threading.Event()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(store.telemetry, "add_logs", never)
        with_lines = Reporter(store, job, attempt(store, job), lost=pytest.fail)
        with_lines.__enter__()
        os.write(1, b"kept\n")
        while attempt(store, job).heartbeat < 4:
            assert not waiting.wait(0.01)
    with_lines.__exit__()
    assert messages(store, job) == ["kept"]


def test_an_attempt_that_was_given_up_writes_no_figures_and_no_lines(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "BEAT_S", 3_600.0)  # what is written must find it out by itself
    told: list[str] = []
    with Reporter(store, job, attempt(store, job), lost=told.append) as mine:
        assert store.jobs.lose_attempt(job.id, 1, "its node was cut off")
        assert store.jobs.open_attempt(job.id, 2, "default.job-1.2")
        assert store.jobs.begin(job.id, 2, {})
        mine.metrics.log(1, [("loss", 2.0)])
        mine.metrics.progress(1, 2, "steps")
        os.write(1, b"still here\n")
        with pytest.raises(Unavailable, match="given up"):
            mine.metrics.flush()
        assert not mine.finish()
    assert store.telemetry.metrics("default", job.run_id) == []
    assert messages(store, job) == []
    now = store.jobs.get("default", "job-1")
    assert now is not None
    assert now.progress is None


def test_what_came_before_the_end_is_written_before_the_end(store: Store, job: Job) -> None:
    with Reporter(store, job, attempt(store, job), lost=pytest.fail) as mine:
        mine.metrics.log(1, [("loss", 2.0)])
        os.write(1, b"the last line\n")
        assert mine.finish()
        assert messages(store, job) == ["the last line"]
        assert store.telemetry.newest_metrics("default", job.run_id) == {"loss": 2.0}
        assert store.jobs.complete(job.id, 1, {})
        os.write(1, b"not of the job any more\n")
    assert messages(store, job) == ["the last line"]


def test_a_driver_that_writes_its_end_does_not_take_that_for_being_given_up(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "WRITE_S", 0.001)
    monkeypatch.setattr(reporter, "BEAT_S", 0.0)
    lost: list[str] = []
    with Reporter(store, job, attempt(store, job), lost=lost.append) as reporting:
        assert reporting.finish()
        assert store.jobs.complete(job.id, 1, {})
        for thread in reporting._threads:
            thread.join(timeout=10)
            assert not thread.is_alive()
    assert lost == []


def test_a_step_is_taken_again_until_the_database_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    answers = iter([away(), away(), "done"])

    def step() -> str:
        answer = next(answers)
        if isinstance(answer, OperationalError):
            raise answer
        return answer

    assert steadily(step) == "done"


def test_a_step_that_can_never_go_well_is_taken_once_and_another_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def wrong() -> None:
        tries.append(True)
        raise IntegrityError("", {}, Exception("it is there already"))

    with pytest.raises(IntegrityError):
        steadily(wrong)
    assert len(tries) == 1
    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    monkeypatch.setattr(reporter, "LIFE_S", 0.05)
    with pytest.raises(OperationalError):
        steadily(never)


def test_a_driver_ends_itself_before_another_attempt_begins_and_not_for_one_lock_of_the_database() -> None:
    assert 2 * BUSY_S + reporter.BEAT_S < reporter.LIFE_S
    assert reporter.LIFE_S + BUSY_S < LEASE_S
