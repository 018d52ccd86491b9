"""The benches: their figures, and that what they fill a store with is what drivers leave."""

import json
import warnings
from pathlib import Path

import pytest

from scripts.figures import Figure, figure, write_json, write_table
from stack.config import Config
from stack.store import Store

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from scripts import bench_jobs


def test_the_median_is_compared_with_the_target() -> None:
    one = figure("status", "ms", [1.0, 2.0, 300.0], most=20)
    assert (one.p50, one.met) == (2.0, True)
    assert one.p99 is not None
    assert one.p99 > 200
    assert not figure("status", "ms", [21.0, 22.0], most=20).met
    assert Figure("speed", "ms", 1e9).met, "it has no target"


def test_figures_are_read_by_people_and_by_programs(tmp_path: Path) -> None:
    figures = [Figure("status", "ms", 2.04, 1234.5, most=20), Figure("growth", "times", 3, most=1.25)]
    assert write_table(figures).splitlines()[2:] == [
        "| status | 2.04 ms | 1,234 ms | ≤ 20 ms | met |",
        "| growth | 3 times |  | ≤ 1.25 times | MISSED |",
    ]
    write_json(tmp_path / "figures.json", figures, bench="jobs")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["bench"] == "jobs"
    assert written["figures"][0] == {
        "name": "status", "unit": "ms", "p50": 2.04, "p99": 1234.5, "most": 20, "met": True
    }  # fmt: skip


def test_the_supervisor_is_measured_among_jobs_as_drivers_leave_them(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LEVELS", (0, 10, 30)), ("WAITING", 15), ("PASSES", 3)):
        monkeypatch.setattr(bench_jobs, name, value)
    bench = bench_jobs.Bench(Config.parse({"models": [bench_jobs.MODEL]}, "config"), store, tmp_path / "home")
    figures = bench.supervisor()
    assert [one.name for one in figures if "look" in one.name] == [
        f"supervisor's look, {level} finished, 15 waiting" for level in (0, 10, 30)
    ]
    if store.engine.dialect.name == "sqlite":
        assert figures[-1].met, "it goes through a whole table"
    counts = store.jobs.counts()
    assert sum(count for (_, _, status), count in counts.items() if status == "completed") == 30
    assert sum(count for (_, _, status), count in counts.items() if status == "scheduled") == 15
    (job,) = store.jobs.page("tenant-1", ["supervised_fine_tune"], limit=1)
    whole = store.jobs.get("tenant-1", job.uuid)
    assert whole is not None
    assert [attempt.retryable for attempt in store.jobs.attempts(job.id)] == [True, False]
    assert len(store.telemetry.metrics("tenant-1", whole.run_id)) == bench_jobs.METRICS
    assert len(store.telemetry.logs_after("tenant-1", whole.run_id, 0, 100)) == bench_jobs.LINES
