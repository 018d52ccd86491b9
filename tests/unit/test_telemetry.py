"""Metrics and how they are thinned out, logs and their search, and traces told in any order."""

import datetime as dt
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Engine, event, insert

from jobs.training_worker import RECORDED, drop_figures
from stack import post_training, telemetry
from stack.api.telemetry import (
    Event,
    Info,
    LogEntry,
    LogFilters,
    LogMessagesRequest,
    LogMetricsRequest,
    LogSearchRequest,
    MetricValue,
    Time,
)
from stack.context import Context, Principal
from stack.errors import BadInput, NotFound, Unavailable
from stack.store import Store
from stack.store.schema import metrics
from stack.store.telemetry import Metric
from tests import samples, threads

T0 = "2030-01-01T00:00:00.000Z"
TIME: TypeAdapter[str] = TypeAdapter(Time)
INFO: TypeAdapter[dict[str, Any]] = TypeAdapter(Info)
VALUE: TypeAdapter[Any] = TypeAdapter(MetricValue)
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


@pytest.fixture
def run_id(context: Context) -> str:
    return samples.add_job(context.store, "job-1").run_id


def metric(run_id: str, name: str = "loss", value: Any = 0.5, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "timestamp": T0, "run_id": run_id} | more


def log_metrics(context: Context, run_id: str, *values: dict[str, Any]) -> None:
    telemetry.log_metrics(context, LogMetricsRequest(run_id=run_id, metrics=list(values)))


def series(context: Context, run_id: str, **query: Any) -> list[tuple[str, int, Any]]:
    wanted = {"name": None, "from_step": None, "to_step": None, "max_points": 10_000} | query
    return [(found.name, found.step, found.value) for found in telemetry.metrics(context, run_id, **wanted)]


def other(context: Context) -> Context:
    return context.of(Principal("acme", frozenset({"training"})))


# Times and values


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("2030-01-31T12:00:00Z", "2030-01-31T12:00:00.000Z"),
        ("2030-01-31T12:00:00.123456+02:00", "2030-01-31T10:00:00.123Z"),
        ("2030-01-31 12:00", "2030-01-31T12:00:00.000Z"),
        ("2030-01-31", "2030-01-31T00:00:00.000Z"),
        ("0001-01-01T00:00:00", "0001-01-01T00:00:00.000Z"),
    ],
)
def test_times_are_kept_in_utc_with_milliseconds(given: str, kept: str) -> None:
    assert TIME.validate_python(given) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "now",
        "12:00",
        "2030-13-01T00:00:00Z",
        "0001-01-01T00:00:00+10:00",
        "2030-01-01T00:00:00Z\0",
        5,
        None,
        T0 * 9,
    ],
)
def test_what_is_no_time_is_refused(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        TIME.validate_python(wrong)


@pytest.mark.parametrize(
    "value", [0.1, -0.0, 1e300, 5, -(2**63), 2**63 - 1, 2**53 + 1, True, False, "phase 2", "", "1", 0]
)
def test_a_value_is_read_back_as_what_it_is(context: Context, run_id: str, value: Any) -> None:
    log_metrics(context, run_id, metric(run_id, value=value))
    ((_, _, found),) = series(context, run_id)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (float("nan"), "JSON cannot hold"),
        (float("inf"), "JSON cannot hold"),
        (2**63, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        (10**400, "64 bits"),
        ("x" * 1_001, "at most 1000"),
        ("\0", "NUL"),
        (None, "a number"),
        ([1], "a number"),
        ({}, "a number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_value_is_refused(wrong: Any, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        VALUE.validate_python(wrong)


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels else {}


def test_additional_info_that_fits_is_taken_as_it_is() -> None:
    for info in ({}, nested(19), {"a": [1, "x", None, {"ä": "\0"}]}, {"a": "x" * 16_000}):
        assert INFO.validate_python(info) == info


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (nested(20), "20 levels"),
        ({"a": float("nan")}, "NaN"),
        ({"a": "\ud83d"}, "half of a character"),
        ({"\ud83d": 1}, "half of a character"),
        ({"a": "x" * 16_384}, "at most 16384"),
        ({str(number): 0 for number in range(1_001)}, "at most 1000"),
    ],
    ids=["deep", "NaN", "half", "half a key", "long", "many"],
)
def test_additional_info_that_could_not_be_kept_or_answered_is_refused(wrong: Any, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        INFO.validate_python(wrong)


# Metrics


def test_metrics_without_a_step_are_counted_by_name(context: Context, run_id: str) -> None:
    log_metrics(context, run_id, metric(run_id, "a", 1.0), metric(run_id, "b", 2.0), metric(run_id, "a", 3.0))
    log_metrics(context, run_id, metric(run_id, "a", 4.0, step=10), metric(run_id, "a", 5.0), metric(run_id, "b", 6.0))
    log_metrics(context, run_id, metric(run_id, "a", 7.0, step=5), metric(run_id, "a", 8.0))
    assert [(step, value) for _, step, value in series(context, run_id, name="a")] == [
        (0, 1.0), (1, 3.0), (5, 7.0), (10, 4.0), (11, 5.0), (12, 8.0),
    ]  # fmt: skip
    assert [(step, value) for _, step, value in series(context, run_id, name="b")] == [(0, 2.0), (1, 6.0)]


def test_the_steps_of_many_metrics_take_one_query(context: Context, run_id: str) -> None:
    queries: list[str] = []
    event.listen(context.store.engine, "before_cursor_execute", lambda *given: queries.append(given[2]))
    log_metrics(context, run_id, *(metric(run_id, f"metric-{number}") for number in range(500)))
    assert len([query for query in queries if "metrics" in query]) == 2, "the last steps, and one insert"


def test_requests_at_once_get_steps_of_their_own(context: Context, run_id: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(log_metrics, context, run_id, metric(run_id), metric(run_id)) for _ in range(20)]:
            done.result()
    assert [step for _, step, _ in series(context, run_id)] == list(range(40))


def test_metrics_are_found_by_name_and_steps(context: Context, run_id: str) -> None:
    log_metrics(context, run_id, *(metric(run_id, name, 0.0, step=step) for name in "ab" for step in range(10)))
    assert series(context, run_id, from_step=8) == [(name, step, 0.0) for step in (8, 9) for name in "ab"]
    assert series(context, run_id, name="a", from_step=3, to_step=4) == [("a", 3, 0.0), ("a", 4, 0.0)]
    assert series(context, run_id, to_step=0) == [("a", 0, 0.0), ("b", 0, 0.0)]
    assert series(context, run_id, from_step=5, to_step=4) == []
    assert series(context, run_id, name="c") == []


def test_metrics_keep_their_times(context: Context, run_id: str) -> None:
    log_metrics(context, run_id, metric(run_id, timestamp="2030-01-01T01:00:00+01:00"))
    (found,) = telemetry.metrics(context, run_id, None, None, None, 10)
    assert found.timestamp == T0


def test_a_run_that_is_not_there_or_anothers_is_not_found(context: Context, run_id: str) -> None:
    log_metrics(context, run_id, metric(run_id))
    for who, run in ((context, "none"), (context, "\0"), (other(context), run_id)):
        with pytest.raises(NotFound) as missing:
            series(who, run)
        assert missing.value.param == "run_id"
    with pytest.raises(NotFound, match=run_id):
        log_metrics(other(context), run_id, metric(run_id))
    assert len(series(context, run_id)) == 1


def test_a_metric_of_another_run_is_refused_and_none_is_written(context: Context, run_id: str) -> None:
    with pytest.raises(BadInput, match=f"'elsewhere'.*'{run_id}'") as wrong:
        log_metrics(context, run_id, metric(run_id), metric("elsewhere"))
    assert wrong.value.param == "metrics.1.run_id"
    assert series(context, run_id) == []


def test_a_run_has_at_most_a_thousand_names(context: Context, run_id: str) -> None:
    log_metrics(context, run_id, *(metric(run_id, f"metric-{number}") for number in range(telemetry.MAX_NAMES)))
    with pytest.raises(BadInput, match="1000 names"):
        log_metrics(context, run_id, metric(run_id, "one more"))
    log_metrics(context, run_id, metric(run_id, "metric-0"))
    assert len(series(context, run_id)) == telemetry.MAX_NAMES + 1


# Thinning out


def add(context: Context, run_id: str, name: str, steps: range) -> None:
    points = [Metric(run_id, name, step, float(step), T0) for step in steps]
    context.store.telemetry.add_points("default", points)


def steps(context: Context, run_id: str, name: str, most: int) -> list[int]:
    return [step for found, step, _ in series(context, run_id, max_points=most) if found == name]


@pytest.mark.parametrize("count", [11, 12, 15, 19, 20, 21, 99, 100, 101, 1_000])
def test_the_points_kept_are_as_many_as_allowed_and_even(context: Context, run_id: str, count: int) -> None:
    add(context, run_id, "loss", range(100, 100 + count))
    kept = steps(context, run_id, "loss", 10)
    gaps = [after - before for before, after in pairwise(kept)]
    assert (len(kept), kept[0], kept[-1]) == (10, 100, 99 + count)
    assert max(gaps) - min(gaps) <= 1


def test_when_all_fit_all_are_kept(context: Context, run_id: str) -> None:
    add(context, run_id, "loss", range(10))
    assert steps(context, run_id, "loss", 10) == list(range(10))


def test_each_name_is_thinned_out_by_itself_and_short_ones_stay_whole(context: Context, run_id: str) -> None:
    add(context, run_id, "long", range(1_000))
    add(context, run_id, "longer", range(5_000, 10_000))
    add(context, run_id, "score", range(0, 900, 300))
    kept = {name: steps(context, run_id, name, 103) for name in ("long", "longer", "score")}
    assert kept["score"] == [0, 300, 600]
    assert [len(kept[name]) for name in ("long", "longer")] == [50, 50]
    assert [(kept[name][0], kept[name][-1]) for name in ("long", "longer")] == [(0, 999), (5_000, 9_999)]


def test_points_at_the_same_step_are_thinned_out_too(context: Context, run_id: str) -> None:
    context.store.telemetry.add_metrics("default", run_id, [("loss", 1, float(number)) for number in range(100)])
    values = [value for _, _, value in series(context, run_id, max_points=10)]
    assert values == [0.0, 11.0, 22.0, 33.0, 44.0, 55.0, 66.0, 77.0, 88.0, 99.0]


def test_fewer_points_than_two_for_each_name_are_refused(context: Context, run_id: str) -> None:
    for name in ("a", "b", "c"):
        add(context, run_id, name, range(9))
    assert len(series(context, run_id, max_points=6)) == 6
    with pytest.raises(BadInput, match="from 6, or name one") as wrong:
        series(context, run_id, max_points=5)
    assert wrong.value.param == "max_points"
    assert len(series(context, run_id, max_points=2, name="b")) == 2


def test_the_metrics_of_a_jobs_artifacts_are_bounded_and_are_numbers(context: Context) -> None:
    run_id = samples.add_job(context.store, "tune-1", "supervised_fine_tune").run_id
    add(context, run_id, "loss", range(12_000))
    log_metrics(
        context, run_id, *(metric(run_id, name, value) for name, value in zip("abc", (True, "x", 7), strict=True))
    )
    found = post_training.job_artifacts(context, "tune-1").metrics
    assert len(found) <= 10_000
    assert [point.value for point in found if point.name != "loss"] == [7]
    losses = [point.step for point in found if point.name == "loss"]
    assert (len(losses), losses[0], losses[-1]) == (9_997, 0, 11_999)


# The newest of each name


def test_the_newest_metric_is_that_at_the_greatest_step(context: Context, run_id: str) -> None:
    newest = context.store.telemetry.newest_metrics
    assert newest("default", run_id) == {}
    log_metrics(context, run_id, metric(run_id, "loss", 0.1, step=9), metric(run_id, "loss", 0.2, step=1))
    log_metrics(
        context, run_id, metric(run_id, "tokens", 7), metric(run_id, "phase", "warm"), metric(run_id, "ok", True)
    )
    assert newest("default", run_id) == {"loss": 0.1, "tokens": 7.0}
    log_metrics(context, run_id, metric(run_id, "loss", 0.3, step=9))
    assert newest("default", run_id)["loss"] == 0.3, "of two at a step, the one that came last"
    assert newest("acme", run_id) == {}


def test_the_newest_metrics_of_a_long_run_are_found_without_reading_it(tmp_path: Path) -> None:
    """The steps that SQLite takes for them do not grow with the run."""
    store = Store(f"sqlite:///{tmp_path}/stack.db")
    short, long = (samples.add_job(store, uuid).run_id for uuid in ("short", "long"))

    def no_points(last: dict[str, int]) -> list[Metric]:
        assert last.keys() == {"a", "b"}
        return []

    def work(run_id: str) -> int:
        """The virtual machine's steps, in hundreds."""
        hundreds = 0

        def count() -> int:
            nonlocal hundreds
            hundreds += 1
            return 0

        with store.engine.connect() as connection:
            raw = connection.connection.driver_connection
            assert raw is not None
            raw.set_progress_handler(count, 100)
        assert store.telemetry.newest_metrics("default", run_id).keys() == {"a", "b"}
        store.telemetry.add_after("default", run_id, no_points)
        raw.set_progress_handler(None, 100)
        return hundreds

    for run_id, count in ((short, 10), (long, 20_000)):
        rows = [dict(run_id=run_id, tenant="default", name=name, step=step, value=1.0, timestamp=T0)
                for name in "ab" for step in range(count)]  # fmt: skip
        with store.engine.begin() as connection:
            connection.execute(insert(metrics), rows)
    assert work(long) <= work(short) + 5
    store.close()


# Logs


def log(message: str, **more: Any) -> dict[str, Any]:
    return {"message": message, "level": "info", "timestamp": T0, "additional_info": {}} | more


def log_messages(context: Context, *logs: dict[str, Any], run_id: str | None = None) -> None:
    telemetry.log_messages(context, LogMessagesRequest(logs=list(logs), run_id=run_id))


def found(context: Context, query: str = "", **more: Any) -> list[LogEntry]:
    return telemetry.get_logs(context, LogSearchRequest(query=query, **more))


def messages(context: Context, query: str = "", **more: Any) -> list[str]:
    return [entry.message for entry in found(context, query, **more)]


def test_logs_are_found_as_they_were_sent_and_newest_first(context: Context, run_id: str) -> None:
    log_messages(context, log("one", level="WARNING", additional_info={"a": [1, None]}), log("two"), run_id=run_id)
    log_messages(context, log("three", timestamp="2029-01-01T00:00:00Z"))
    three, two, one = found(context)
    assert [entry.message for entry in (three, two, one)] == ["three", "two", "one"]
    assert (one.level, one.additional_info, one.timestamp, one.run_id) == ("WARNING", {"a": [1, None]}, T0, run_id)
    assert (three.run_id, three.timestamp) == (None, "2029-01-01T00:00:00.000Z")
    assert three.id > two.id > one.id


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["50 OF 100", "50% done", "a_b/c"]),
        ("50", ["50 OF 100", "50% done"]),
        ("50%", ["50% done"]),
        ("%", ["50% done"]),
        ("_", ["a_b/c"]),
        ("b/", ["a_b/c"]),
        ("of", ["50 OF 100"]),
        ("DONE", ["50% done"]),
        ("'", []),
    ],
)
def test_a_text_is_found_wherever_it_stands_and_means_itself(context: Context, query: str, expected: list[str]) -> None:
    log_messages(context, log("a_b/c"), log("50% done"), log("50 OF 100"))
    assert messages(context, query) == expected


def test_logs_are_filtered_by_run_job_level_and_time(context: Context, run_id: str) -> None:
    log_messages(context, log("early", level="DEBUG"), log("late", timestamp="2030-01-02T00:00:00Z"), run_id=run_id)
    log_messages(context, log("elsewhere", level="error"))
    assert messages(context, filters={"run_id": run_id}) == ["late", "early"]
    assert messages(context, filters={"job_uuid": "job-1"}) == ["late", "early"]
    assert messages(context, filters={"job_uuid": "job-1", "run_id": run_id}) == ["late", "early"]
    assert messages(context, filters={"level": "debug"}) == ["early"]
    assert messages(context, filters={"level": ["Debug", "ERROR"]}) == ["elsewhere", "early"]
    assert messages(context, filters={"level": []}) == []
    assert messages(context, filters={"after": "2030-01-02T00:00:00Z"}) == ["late"]
    assert messages(context, filters={"before": "2030-01-02T02:00:00+02:00", "level": "debug"}) == ["early"]
    assert messages(context, filters={"after": T0, "before": T0}) == []
    assert messages(context, "a", filters={"run_id": run_id, "level": "info"}) == ["late"]


def test_a_job_and_the_run_of_another_have_no_log_in_common(context: Context, run_id: str) -> None:
    samples.add_job(context.store, "job-2")
    log_messages(context, log("one"), run_id=run_id)
    assert messages(context, filters={"job_uuid": "job-2", "run_id": run_id}) == []


def test_pages_of_logs_have_each_of_them_once(context: Context) -> None:
    log_messages(context, *(log(f"line {number}") for number in range(25)))
    pages, after = [], None
    while page := found(context, "line", limit=10, after_id=after):
        pages.append([entry.message for entry in page])
        after = page[-1].id
        log_messages(context, log("line in between"))
    assert [len(page) for page in pages] == [10, 10, 5]
    assert list(chain.from_iterable(pages)) == [f"line {number}" for number in reversed(range(25))]


def test_anothers_logs_runs_and_jobs_are_not_found(context: Context, run_id: str) -> None:
    log_messages(context, log("mine"), run_id=run_id)
    assert messages(other(context)) == []
    for filters in ({"run_id": run_id}, {"job_uuid": "job-1"}):
        with pytest.raises(NotFound) as missing:
            found(other(context), filters=filters)
        assert missing.value.param == f"filters.{next(iter(filters))}"
    with pytest.raises(NotFound):
        log_messages(other(context), log("theirs"), run_id=run_id)
    assert messages(context) == ["mine"]


def test_an_unknown_filter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="'colour'; allowed: run_id, job_uuid, trace_id, level, after, before"):
        LogFilters.model_validate({"colour": "red"})


# Attempts at jobs


def test_an_attempt_that_is_not_open_changes_nothing(context: Context, run_id: str) -> None:
    store = context.store
    job = samples.start(store, "job-1")
    mine = (job.id, 1)
    told = store.telemetry
    assert told.add_metrics("default", run_id, [("loss", 1, 2.0), ("loss", 2, 1.0)], mine)
    assert told.add_logs("default", run_id, [(T0, "info", "one")], mine)
    assert told.drop_metrics("default", run_id, 1, ["loss"], mine)
    assert store.jobs.lose_attempt(job.id, 1, "lost")
    assert store.jobs.open_attempt(job.id, 2, "default.job-1.2")
    assert not told.add_metrics("default", run_id, [("loss", 3, 0.5)], mine)
    assert not told.add_logs("default", run_id, [(T0, "info", "two")], mine)
    assert not told.drop_metrics("default", run_id, 0, ["loss"], mine)
    assert told.add_metrics("default", run_id, [("loss", 2, 0.5)], (job.id, 2))
    assert series(context, run_id) == [("loss", 1, 2.0), ("loss", 2, 0.5)]
    assert messages(context) == ["one"]


def test_what_others_have_logged_for_a_jobs_run_outlasts_a_lost_attempt(context: Context, run_id: str) -> None:
    job = samples.start(context.store, "job-1")
    context.store.telemetry.add_metrics("default", run_id, [(name, 5, 1.0) for name in RECORDED])
    log_metrics(context, run_id, metric(run_id, "accuracy", 0.9))
    log_metrics(context, run_id, metric(run_id, "accuracy", 0.95))
    context.store.telemetry.add_metrics("default", run_id, [("loss", 0, 3.0)])
    drop_figures(context, job, 1, after_step=0)
    assert series(context, run_id) == [("accuracy", 0, 0.9), ("loss", 0, 3.0), ("accuracy", 1, 0.95)]
    context.store.jobs.lose_attempt(job.id, 1, "lost")
    with pytest.raises(Unavailable, match="given up"):
        drop_figures(context, job, 1, after_step=-1)


def overtaken(engine: Engine, first: Callable[[], object], second: Callable[[], object]) -> bool:
    """Whether `second`, which begins when `first` is about to commit, is done before it."""
    about_to, done = threading.Event(), threading.Event()
    seen: list[bool] = []

    def wait(_: object) -> None:
        if not about_to.is_set():
            about_to.set()
            seen.append(done.wait(0.5))

    def begin_second() -> None:
        assert about_to.wait(10)
        second()
        done.set()

    event.listen(engine, "commit", wait)
    try:
        threads.at_once(first, begin_second)
    finally:
        event.remove(engine, "commit", wait)
    return seen[0]


def test_who_follows_a_log_misses_no_line_of_writers_at_once(context: Context, run_id: str) -> None:
    """A line with a smaller id than one that was seen already would never be."""

    def add(message: str) -> Callable[[], object]:
        return lambda: context.store.telemetry.add_logs("default", run_id, [(T0, "info", message)])

    assert not overtaken(context.store.engine, add("one"), add("two"))
    assert messages(context) == ["two", "one"]


def test_an_attempt_ends_before_or_after_what_it_writes(context: Context, run_id: str) -> None:
    job = samples.start(context.store, "job-1")
    assert not overtaken(
        context.store.engine,
        lambda: context.store.telemetry.add_metrics("default", run_id, [("loss", 1, 2.0)], (job.id, 1)),
        lambda: context.store.jobs.lose_attempt(job.id, 1, "lost"),
    )


# Traces


def told(context: Context, kind: str, span_id: str = "s-1", at: str = T0, **more: Any) -> None:
    """Tells an event of the trace t-1."""
    body = {"type": kind, "trace_id": "t-1", "span_id": span_id, "timestamp": at} | more
    telemetry.log_event(context, EVENT.validate_python(body))


def start(context: Context, span_id: str = "s-1", at: str = T0, name: str = "ask", **more: Any) -> None:
    parent = more.pop("parent_span_id", None)
    payload = {"type": "span_start", "name": name} | ({"parent_span_id": parent} if parent else {})
    told(context, "structured_log", span_id, at, payload=payload, **more)


def end(context: Context, span_id: str = "s-1", at: str = T0, status: str = "ok", **more: Any) -> None:
    told(context, "structured_log", span_id, at, payload={"type": "span_end", "status": status}, **more)


def second(number: int) -> str:
    return (dt.datetime(2030, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def test_a_trace_has_its_spans_logs_and_metrics(context: Context) -> None:
    start(context, "root", second(0), attributes={"user": "u"})
    start(context, "child", second(1), name="search", parent_span_id="root")
    message = {"message": "found", "severity": "info", "attributes": {"n": 3}}
    told(context, "unstructured_log", "child", second(2), **message)
    told(context, "metric", "child", second(2), metric="tokens", value=12, unit="tokens", attributes={"m": None})
    end(context, "child", second(3), status="error", attributes={"why": "none"})
    end(context, "root", second(4))
    trace = telemetry.get_trace(context, "t-1", 10)
    assert (trace.root_span_id, trace.start_time, trace.end_time) == ("root", second(0), second(4))
    root, child = trace.spans
    assert (root.name, root.parent_span_id, root.status, root.attributes) == ("ask", None, "ok", {"user": "u"})
    assert (child.name, child.parent_span_id, child.status) == ("search", "root", "error")
    assert (child.start_time, child.end_time, child.attributes) == (second(1), second(3), {"why": "none"})
    (line,), (measured,) = trace.logs, trace.metrics
    assert (line.message, line.level, line.timestamp) == ("found", "info", second(2))
    assert line.additional_info == {"span_id": "child", "attributes": {"n": 3}}
    assert (measured.metric, measured.value, measured.unit, measured.span_id) == ("tokens", 12.0, "tokens", "child")
    assert (measured.timestamp, measured.attributes) == (second(2), {"m": None})
    assert trace.cut == []


def test_the_logs_of_a_trace_are_found_by_search(context: Context) -> None:
    told(context, "unstructured_log", message="found it", severity="critical")
    told(context, "metric", metric="tokens", value=12.5, unit="")
    log_messages(context, log("elsewhere"))
    assert messages(context, filters={"trace_id": "t-1"}) == ["tokens = 12.5", "found it"]
    assert messages(context, filters={"trace_id": "t-1", "level": "critical"}) == ["found it"]
    assert messages(context, filters={"level": "metric"}) == ["tokens = 12.5"]
    assert messages(context, filters={"trace_id": "t-2"}) == []


def test_a_span_may_end_before_its_start_is_told(context: Context) -> None:
    end(context, at=second(2), status="error", attributes={"a": "end", "b": 1})
    trace = telemetry.get_trace(context, "t-1", 10)
    assert (trace.start_time, trace.end_time, trace.spans[0].name) == (second(2), second(2), None)
    start(context, at=second(1), parent_span_id="up", attributes={"a": "start", "c": 2})
    (span,) = telemetry.get_trace(context, "t-1", 10).spans
    assert (span.name, span.parent_span_id, span.start_time, span.end_time) == ("ask", "up", second(1), second(2))
    assert (span.status, span.attributes) == ("error", {"a": "end", "b": 1, "c": 2})


def test_what_is_told_twice_alike_counts_once(context: Context) -> None:
    for _ in range(2):
        start(context, attributes={"a": 1})
    for _ in range(2):
        end(context, at=second(1), attributes={"b": 1})
    start(context, attributes={"a": 1})
    trace = telemetry.get_trace(context, "t-1", 10)
    assert (len(trace.spans), trace.logs) == (1, [])


def test_the_first_start_and_end_of_a_span_stand_and_others_are_kept_as_warnings(context: Context) -> None:
    start(context)
    start(context, at=second(1), name="another", attributes={"a": 1})
    end(context, at=second(2))
    end(context, at=second(3), status="error")
    trace = telemetry.get_trace(context, "t-1", 10)
    (span,) = trace.spans
    assert (span.name, span.start_time, span.end_time, span.status) == ("ask", T0, second(2), "ok")
    again, after = trace.logs
    assert (again.level, after.level) == ("warn", "warn")
    assert again.additional_info == {
        "event": {"type": "span_start", "name": "another", "parent_span_id": None},
        "span_id": "s-1",
        "attributes": {"a": 1},
    }
    assert "started again, as 'another'" in again.message
    assert (after.timestamp, after.additional_info["event"]["status"]) == (second(3), "error")


def test_starts_and_ends_told_at_once_make_whole_spans(context: Context) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = [f"s-{number}" for number in range(20)]
        for done in [pool.submit(tell, context, span_id) for span_id in ids for tell in (start, end, start, end)]:
            done.result()
    trace = telemetry.get_trace(context, "t-1", 100)
    assert sorted(span.span_id for span in trace.spans) == sorted(ids)
    assert all((span.name, span.status, span.end_time) == ("ask", "ok", T0) for span in trace.spans)
    assert trace.logs == []


@pytest.mark.parametrize(
    ("spans", "root"),
    [
        ([("a", 2, None), ("b", 1, "a")], "a"),
        ([("a", 2, None), ("b", 1, None)], "b"),
        ([("a", 2, "remote"), ("b", 3, "a")], "a"),
        ([("a", 2, "b"), ("b", 1, "a")], "b"),
        ([("a", 1, None), ("b", 1, None)], "a"),
    ],
)
def test_the_root_is_the_first_span_without_a_parent(
    context: Context, spans: list[tuple[str, int, str | None]], root: str
) -> None:
    end(context, "unknown", second(0))
    for span_id, at, parent in spans:
        start(context, span_id, second(at), parent_span_id=parent)
    assert telemetry.get_trace(context, "t-1", 10).root_span_id == root


@pytest.mark.parametrize("kind", ["unstructured_log", "metric"])
def test_a_trace_without_spans_begins_with_its_first_event(context: Context, kind: str) -> None:
    if kind == "metric":
        told(context, "metric", "s-0", second(1), metric="tokens", value=1, unit="")
    told(context, "unstructured_log", "s-1", second(2), message="one", severity="info")
    told(context, "metric", "s-2", second(3), metric="tokens", value=1, unit="")
    trace = telemetry.get_trace(context, "t-1", 10)
    expected = ("s-0", second(1), None) if kind == "metric" else ("s-1", second(2), None)
    assert (trace.root_span_id, trace.start_time, trace.end_time) == expected


def test_a_trace_is_cut_at_the_limit_and_says_so(context: Context) -> None:
    for number in range(3):
        start(context, f"s-{number}", second(number))
    told(context, "unstructured_log", message="one", severity="info")
    told(context, "unstructured_log", message="two", severity="info")
    trace = telemetry.get_trace(context, "t-1", 2)
    assert ([span.span_id for span in trace.spans], len(trace.logs), trace.cut) == (["s-0", "s-1"], 2, ["spans"])
    assert telemetry.get_trace(context, "t-1", 1).cut == ["spans", "logs"]


def test_traces_of_tenants_are_apart(context: Context) -> None:
    start(context)
    for trace_id, who in (("t-1", other(context)), ("t-2", context), ("\0", context)):
        with pytest.raises(NotFound):
            telemetry.get_trace(who, trace_id, 10)
    start(other(context), name="theirs")
    assert telemetry.get_trace(other(context), "t-1", 10).spans[0].name == "theirs"
    assert telemetry.get_trace(context, "t-1", 10).spans[0].name == "ask"
