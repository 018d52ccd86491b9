"""What a running job writes down: its figures, its log, its heartbeat."""

import threading

import pytest
from sqlalchemy.exc import OperationalError

from jobs import reporter
from jobs.reporter import Metrics, Reporter
from stack.store import Attempt, Job, Store
from tests import samples


@pytest.fixture
def job(store: Store) -> Job:
    samples.add_job(store, "job-1")
    return samples.start(store, "job-1")


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

    def busy_twice(tenant: str, run_id: str, values: list[tuple[str, int, float]]) -> None:
        tries.append(len(values))
        if len(tries) <= 2:
            raise OperationalError("insert", {}, Exception("database is locked"))
        add(tenant, run_id, values)

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

    def away(*_: object) -> bool:
        raise OperationalError("update", {}, Exception("could not connect"))

    mine = attempt(store, job)
    monkeypatch.setattr(store.jobs, "beat", away)
    with Reporter(store, job, mine, lost=lambda _: heard.set()):
        assert heard.wait(10)
