"""The store: what is unique, how a job moves from state to state, metrics, and many writers at once."""

import datetime as dt
import math
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import pytest
from sqlalchemy.exc import IntegrityError

from stack.store import Adapter, Store, now
from tests import samples

WRITERS = 8
T = TypeVar("T")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/folder/stack.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def add_job(store: Store, uuid: str = "job-1", kind: str = "evaluate", **request: Any) -> bool:
    return store.add_job(uuid, kind, request, submission_id=None)


def status(store: Store, uuid: str = "job-1") -> str:
    job = store.job(uuid)
    assert job is not None
    return job.status


def at_once(action: Callable[[int], T]) -> list[T]:
    """The results of an action that several threads take at the same moment."""
    barrier = Barrier(WRITERS)

    def act(number: int) -> T:
        barrier.wait(timeout=30)
        return action(number)

    with ThreadPoolExecutor(WRITERS) as threads:
        return list(threads.map(act, range(WRITERS)))


def test_times_are_utc_in_iso_8601() -> None:
    time = dt.datetime.fromisoformat(now())
    assert now().endswith("Z")
    assert abs((dt.datetime.now(dt.UTC) - time).total_seconds()) < 60


def test_a_job_is_read_as_it_was_written(store: Store) -> None:
    request = {"lr": 0.1, "text": "ä ☃ \u0000", "nested": {"list": [1, None, True]}}
    assert store.add_job("job-1", "evaluate", request, submission_id="ray-1")
    job = store.job("job-1")
    assert job is not None
    assert (job.uuid, job.kind, job.request, job.submission_id) == ("job-1", "evaluate", request, "ray-1")
    assert (job.status, job.started_at, job.completed_at) == ("scheduled", None, None)
    assert (job.progress, job.result, job.error) == (None, None, None)


def test_what_is_not_there_is_none(store: Store) -> None:
    assert (store.job("none"), store.dataset("none"), store.adapter("none")) == (None, None, None)
    assert (store.metrics_of("none"), store.newest_metrics_of("none")) == ([], {})


def test_a_second_job_of_the_same_uuid_is_not_added_and_changes_nothing(store: Store) -> None:
    assert add_job(store, lr=1)
    assert not add_job(store, kind="other", lr=2)
    job = store.job("job-1")
    assert job is not None
    assert (job.kind, job.request) == ("evaluate", {"lr": 1})


def test_a_job_goes_from_scheduled_over_running_to_completed(store: Store) -> None:
    add_job(store)
    assert store.start_job("job-1")
    running = store.job("job-1")
    assert running is not None
    assert running.status == "running"
    assert running.started_at is not None
    assert running.completed_at is None
    assert store.complete_job("job-1", {"path": "a"})
    completed = store.job("job-1")
    assert completed is not None
    assert (completed.status, completed.result, completed.error) == ("completed", {"path": "a"}, None)
    assert completed.completed_at is not None


@pytest.mark.parametrize("is_running", [True, False])
def test_a_job_can_fail_before_and_while_it_runs(store: Store, is_running: bool) -> None:
    add_job(store)
    if is_running:
        store.start_job("job-1")
    assert store.fail_job("job-1", "the reason")
    failed = store.job("job-1")
    assert failed is not None
    assert (failed.status, failed.error, failed.result) == ("failed", "the reason", None)
    assert failed.completed_at is not None


@pytest.mark.parametrize(
    ("moves", "refused"),
    [
        ([], "complete"),
        (["start"], "start"),
        (["start", "complete"], "start"),
        (["start", "complete"], "complete"),
        (["start", "complete"], "fail"),
        (["fail"], "start"),
        (["fail"], "complete"),
        (["fail"], "fail"),
    ],
)
def test_other_moves_are_refused_and_change_nothing(store: Store, moves: list[str], refused: str) -> None:
    actions: dict[str, Callable[[], bool]] = {
        "start": lambda: store.start_job("job-1"),
        "complete": lambda: store.complete_job("job-1", {"by": "test"}),
        "fail": lambda: store.fail_job("job-1", "by test"),
    }
    add_job(store)
    assert all(actions[move]() for move in moves)
    before = store.job("job-1")
    assert not actions[refused]()
    assert store.job("job-1") == before


def test_a_job_that_is_not_there_cannot_be_moved(store: Store) -> None:
    assert not store.start_job("none")
    assert not store.complete_job("none", {})
    assert not store.fail_job("none", "reason")


def test_moving_one_job_leaves_the_others(store: Store) -> None:
    add_job(store, "job-1")
    add_job(store, "job-2")
    store.start_job("job-1")
    assert (status(store, "job-1"), status(store, "job-2")) == ("running", "scheduled")


def test_the_submission_of_a_job_is_kept(store: Store) -> None:
    add_job(store)
    store.set_submission("job-1", "job-1-1")
    job = store.job("job-1")
    assert job is not None
    assert (job.submission_id, job.status) == ("job-1-1", "scheduled")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second each time it is read."""
    ticks = iter(range(60))
    monkeypatch.setattr("stack.store.now", lambda: f"2026-01-01T00:00:{next(ticks):02}.000Z")


@pytest.mark.usefixtures("clock")
def test_jobs_are_listed_by_kind_newest_first(store: Store) -> None:
    for uuid, kind in (("b", "evaluate"), ("c", "other"), ("a", "evaluate"), ("d", "train")):
        add_job(store, uuid, kind)
    assert [job.uuid for job in store.jobs_of_kinds(["evaluate"])] == ["a", "b"]
    assert [job.uuid for job in store.jobs_of_kinds(["train", "other"])] == ["d", "c"]


@pytest.mark.usefixtures("clock")
def test_unfinished_jobs_are_listed_oldest_first(store: Store) -> None:
    for uuid in ("d", "c", "b", "a"):
        add_job(store, uuid)
    store.start_job("b")
    store.fail_job("c", "reason")
    store.start_job("d")
    store.complete_job("d", {})
    assert [job.uuid for job in store.unfinished_jobs()] == ["b", "a"]


def test_progress_and_metrics_are_kept(store: Store) -> None:
    add_job(store)
    store.record_progress("job-1", {"done": 1, "total": 9, "unit": "steps"}, [("loss", 1, 2.5), ("lr", 1, 0.1)])
    store.record_progress("job-1", {"done": 2, "total": 9, "unit": "steps"}, [("loss", 2, 1.5)])
    store.record_progress("job-1", {"done": 3, "total": 9, "unit": "steps"}, [])
    job = store.job("job-1")
    assert job is not None
    assert job.progress == {"done": 3, "total": 9, "unit": "steps"}
    series = [(metric.name, metric.step, metric.value) for metric in store.metrics_of("job-1")]
    assert series == [("loss", 1, 2.5), ("lr", 1, 0.1), ("loss", 2, 1.5)]
    assert store.newest_metrics_of("job-1") == {"loss": 1.5, "lr": 0.1}


def test_metrics_are_in_the_order_of_their_steps(store: Store) -> None:
    store.record_progress("job-1", {}, [("loss", 2, 0.2), ("loss", 1, 0.1)])
    assert [metric.step for metric in store.metrics_of("job-1")] == [1, 2]


def test_progress_and_metrics_of_other_jobs_are_not_mixed_in(store: Store) -> None:
    add_job(store, "job-1")
    add_job(store, "job-2")
    store.record_progress("job-1", {"done": 1}, [("loss", 1, 0.1)])
    store.record_progress("job-2", {"done": 2}, [("loss", 1, 0.2), ("em", 1, 0.3)])
    job = store.job("job-1")
    assert job is not None
    assert job.progress == {"done": 1}
    assert store.newest_metrics_of("job-1") == {"loss": 0.1}
    assert [metric.value for metric in store.metrics_of("job-1")] == [0.1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_does_not_cost_the_others(store: Store, value: float) -> None:
    """A diverging training has such a loss; it must go on being reported."""
    add_job(store)
    store.record_progress("job-1", {"done": 1}, [("loss", 1, value), ("lr", 1, 0.1)])
    job = store.job("job-1")
    assert job is not None
    assert job.progress == {"done": 1}
    assert store.newest_metrics_of("job-1")["lr"] == 0.1


def test_a_data_set_is_unique_and_read_as_it_was_written(store: Store) -> None:
    row = dict(uuid="a", columns={"x": "text"}, content_url="file:///a.jsonl", metadata={"k": [1]}, rows=1, bytes=2)
    row |= dict(sha256="0" * 64, created_at=now())
    assert store.add_dataset(row)
    assert not store.add_dataset(row | {"rows": 99})
    assert store.dataset("a") == row


def test_an_adapter_is_registered_as_its_job_is_completed(store: Store) -> None:
    adapter = Adapter("small:job-1", "small", "job-1", created_at=now())
    add_job(store)
    store.start_job("job-1")
    assert store.adapter("small:job-1") is None
    assert store.complete_job("job-1", {"path": "a"}, adapter)
    assert store.adapter("small:job-1") == adapter
    assert store.adapters() == [adapter]


def test_a_job_that_has_ended_otherwise_registers_no_adapter(store: Store) -> None:
    add_job(store)
    store.start_job("job-1")
    store.fail_job("job-1", "reason")
    assert not store.complete_job("job-1", {}, Adapter("small:job-1", "small", "job-1", created_at=now()))
    assert store.adapters() == []


def test_a_job_whose_adapter_cannot_be_registered_is_not_completed(store: Store) -> None:
    samples.add_adapter(store, "small:other", "small", "other")
    add_job(store)
    store.start_job("job-1")
    with pytest.raises(IntegrityError):
        store.complete_job("job-1", {}, Adapter("small:other", "small", "job-1", created_at=now()))
    assert status(store) == "running"


def test_adapters_are_listed_newest_first(store: Store) -> None:
    for number, uuid in enumerate(("b", "c", "a")):
        add_job(store, uuid)
        store.start_job(uuid)
        store.complete_job(uuid, {}, Adapter(f"small:{uuid}", "small", uuid, f"2026-01-0{number + 1}T00:00:00.000Z"))
    assert [adapter.job_uuid for adapter in store.adapters()] == ["a", "c", "b"]


def test_a_row_that_breaks_another_rule_than_its_uuids_is_not_passed_over(store: Store) -> None:
    with pytest.raises(IntegrityError):
        store.add_dataset(dict(uuid="a", columns={}, content_url=None, rows=1, bytes=1, sha256="", created_at=now()))
    assert store.dataset("a") is None


def test_what_was_written_is_there_after_opening_anew(url: str, store: Store) -> None:
    add_job(store)
    store.record_progress("job-1", {"done": 1}, [("loss", 1, 0.5)])
    store.close()
    again = Store(url)
    assert again.job("job-1") is not None
    assert again.newest_metrics_of("job-1") == {"loss": 0.5}
    again.close()


def test_a_new_store_may_be_opened_many_times_at_once(url: str) -> None:
    stores = at_once(lambda _: Store(url))
    assert [add_job(store, f"job-{number}") for number, store in enumerate(stores)] == [True] * WRITERS
    assert len(stores[0].unfinished_jobs()) == WRITERS
    for store in stores:
        store.close()


def test_opening_a_new_store_waits_while_another_process_sets_it_up(url: str) -> None:
    file = Path(url.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(Store, url)
        done, _ = wait([opening], timeout=0.2)
        other.execute("COMMIT")
        other.close()
        assert not done, opening.exception()
        store = opening.result(timeout=30)
    assert add_job(store)
    store.close()


def test_writers_at_once_lose_nothing(url: str, store: Store) -> None:
    add_job(store)
    steps = 20

    def write(writer: int) -> None:
        own = Store(url)
        for step in range(steps):
            own.record_progress("job-1", {"done": step}, [(f"metric-{writer}", step, float(step))])
            assert own.add_job(f"job-{writer}-{step}", "evaluate", {}, None)
        own.close()

    at_once(write)
    written = {(metric.name, metric.step) for metric in store.metrics_of("job-1")}
    assert written == {(f"metric-{writer}", step) for writer in range(WRITERS) for step in range(steps)}
    assert len(store.metrics_of("job-1")) == WRITERS * steps
    assert len(store.unfinished_jobs()) == 1 + WRITERS * steps


def test_of_many_who_add_or_start_a_job_at_once_one_does(store: Store) -> None:
    assert sorted(at_once(lambda _: add_job(store))) == [False] * (WRITERS - 1) + [True]
    assert sorted(at_once(lambda _: store.start_job("job-1"))) == [False] * (WRITERS - 1) + [True]
    ends = at_once(lambda n: store.complete_job("job-1", {}) if n % 2 else store.fail_job("job-1", "reason"))
    assert sorted(ends) == [False] * (WRITERS - 1) + [True]
