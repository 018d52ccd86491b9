"""The store: what is unique, metrics, and many writers at once. Jobs and migrations have tests of their own."""

import datetime as dt
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest
from sqlalchemy.exc import IntegrityError

from stack.store import Adapter, Store, now
from stack.store.jobs import NewJob
from tests import samples, threads

WRITERS = 8
T = TypeVar("T")


def at_once(do: Callable[[int], T]) -> list[T]:
    """Does something in many threads at the same moment."""
    return threads.at_once(*(partial(do, number) for number in range(WRITERS)))


def test_times_are_utc_in_iso_8601() -> None:
    time = dt.datetime.fromisoformat(now())
    assert time.utcoffset() == dt.timedelta(0)
    assert abs((dt.datetime.now(dt.UTC) - time).total_seconds()) < 60


def test_metrics_are_in_the_order_of_their_steps_and_of_one_run(store: Store) -> None:
    first, second = samples.add_job(store, "job-1"), samples.add_job(store, "job-2")
    store.telemetry.add_metrics("default", first.run_id, [("loss", 2, 0.2), ("loss", 1, 0.1)])
    store.telemetry.add_metrics("default", second.run_id, [("loss", 3, 0.3)])
    assert [metric.step for metric in store.telemetry.metrics("default", first.run_id)] == [1, 2]
    assert store.telemetry.newest_metrics("default", second.run_id) == {"loss": 0.3}
    assert store.telemetry.metrics("acme", first.run_id) == []
    assert store.telemetry.newest_metrics("acme", first.run_id) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_does_not_cost_the_others(store: Store, value: float) -> None:
    """A diverging training has such a loss; it must go on being reported."""
    run_id = samples.add_job(store, "job-1").run_id
    store.telemetry.add_metrics("default", run_id, [("loss", 1, value), ("lr", 1, 0.1)])
    assert store.telemetry.newest_metrics("default", run_id) == {"lr": 0.1}


def test_the_figures_behind_a_checkpoint_are_dropped(store: Store) -> None:
    run_id = samples.add_job(store, "job-1").run_id
    store.telemetry.add_metrics("default", run_id, [("loss", step, float(step)) for step in range(5)])
    store.telemetry.drop_metrics("acme", run_id, after_step=0, names=["loss"])
    store.telemetry.drop_metrics("default", run_id, after_step=2, names=["loss"])
    assert [metric.step for metric in store.telemetry.metrics("default", run_id)] == [0, 1, 2]


def test_a_data_set_is_unique_in_its_tenant_and_read_as_it_was_written(store: Store) -> None:
    row = dict(uuid="a", columns={"x": "text"}, content_url="file:///a.jsonl", metadata={"k": [1]}, rows=1, bytes=2)
    row |= dict(sha256="0" * 64, examples=True, created_at=now())
    assert store.datasets.add("default", row)
    assert not store.datasets.add("default", row | {"rows": 99})
    assert store.datasets.add("acme", row | {"rows": 99})
    assert store.datasets.get("default", "a") == row | {"tenant": "default"}


def test_a_row_that_breaks_another_rule_than_its_uuids_is_not_passed_over(store: Store) -> None:
    row = dict(uuid="a", columns={}, content_url=None, rows=1, bytes=1, sha256="", created_at=now())
    with pytest.raises(IntegrityError):
        store.datasets.add("default", row)
    assert store.datasets.get("default", "a") is None


def test_a_job_whose_adapter_cannot_be_registered_is_not_completed(store: Store) -> None:
    samples.add_adapter(store, "small:other", "small", "other")
    samples.add_job(store, "job-1")
    samples.start(store, "job-1")
    with pytest.raises(IntegrityError):
        samples.complete(
            store, "job-1", {}, Adapter("default", "small:other", "small", "job-1", "adapters/a", created_at=now())
        )
    job = store.jobs.get("default", "job-1")
    assert job is not None
    assert job.status == "running"


def test_adapters_are_listed_newest_first(store: Store) -> None:
    for number, uuid in enumerate(("b", "c", "a")):
        samples.add_job(store, uuid)
        samples.start(store, uuid)
        created_at = f"2026-01-0{number + 1}T00:00:00.000Z"
        samples.complete(
            store, uuid, {}, Adapter("default", f"small:{uuid}", "small", uuid, f"adapters/{uuid}", created_at)
        )
    assert [adapter.job_uuid for adapter in store.adapters.list("default")] == ["a", "c", "b"]


def test_what_was_written_is_there_after_opening_anew(store_url: str, store: Store) -> None:
    run_id = samples.add_job(store, "job-1").run_id
    store.telemetry.add_metrics("default", run_id, [("loss", 1, 0.5)])
    store.close()
    again = Store(store_url)
    assert again.jobs.get("default", "job-1") is not None
    assert again.telemetry.newest_metrics("default", run_id) == {"loss": 0.5}
    again.close()


def test_writers_at_once_lose_nothing(store_url: str, store: Store) -> None:
    run_id = samples.add_job(store, "job-1").run_id
    steps = 20

    def write(writer: int) -> None:
        own = Store(store_url)
        for step in range(steps):
            own.telemetry.add_metrics("default", run_id, [(f"metric-{writer}", step, float(step))])
            samples.add_job(own, f"job-{writer}-{step}")
        own.close()

    at_once(write)
    written = [(metric.name, metric.step) for metric in store.telemetry.metrics("default", run_id)]
    assert sorted(written) == sorted((f"metric-{writer}", step) for writer in range(WRITERS) for step in range(steps))
    assert len(store.jobs.waiting()) == 1 + WRITERS * steps


WRITER = """
import sys
from stack.store import Store
from tests import samples

store = Store(sys.argv[1])
sys.stdin.read()
for number in range(30):
    job = samples.add_job(store, f"{sys.argv[2]}-{number}")
    samples.start(store, job.uuid)
    samples.report(store, job.uuid, {"done": 1}, [("loss", 1, 0.5)])
    samples.complete(store, job.uuid, {})
"""


def test_processes_that_write_at_once_wait_for_each_other(store_url: str, store: Store) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, store_url, str(number)], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for number in range(3)
    ]
    with ThreadPoolExecutor(len(writers)) as waiting:
        complaints = list(waiting.map(lambda writer: writer.communicate()[1].decode(), writers))
    assert complaints == [""] * len(writers)
    assert store.jobs.counts() == {("default", "evaluate", "completed"): 90}


def test_of_many_who_add_start_or_end_a_job_at_once_one_does(store: Store) -> None:
    new = NewJob("default", "job-1", "evaluate", {}, experiment="evaluate")
    added = at_once(lambda _: store.jobs.add(new, max_waiting=10)[1])
    assert sorted(added) == [False] * (WRITERS - 1) + [True]
    (waiting,) = store.jobs.waiting()
    opened = at_once(lambda number: store.jobs.open_attempt(waiting.id, 1, f"s-{number}"))
    assert sorted(opened) == [False] * (WRITERS - 1) + [True]
    begun = at_once(lambda _: store.jobs.begin(waiting.id, 1, {}))
    assert sorted(begun) == [False] * (WRITERS - 1) + [True]
    ends = at_once(
        lambda n: store.jobs.complete(waiting.id, 1, {}) if n % 2 else store.jobs.fail(waiting.id, 1, "reason")
    )
    assert sorted(ends) == [False] * (WRITERS - 1) + [True]
