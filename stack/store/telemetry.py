"""The rows of runs, metrics and logs."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select

from stack.store.connection import hold, now, writing
from stack.store.schema import attempts, logs, metrics, runs

MAX_POINTS = 10_000


@dataclass(frozen=True)
class Metric:
    """A value of a metric of a run at a step."""

    run_id: str
    name: str
    step: int
    value: float | int | str | bool
    timestamp: str


@dataclass(frozen=True)
class Log:
    id: int
    run_id: str | None
    timestamp: str
    level: str
    message: str
    additional_info: dict[str, Any]
    trace_id: str | None = None


@dataclass(frozen=True)
class Message:
    """What is written of a log."""

    timestamp: str
    level: str
    message: str
    additional_info: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A row of `runs`."""

    id: str
    tenant: str
    experiment_id: str
    status: str
    metadata: dict[str, Any]
    started_at: str
    ended_at: str | None


class Telemetry:
    """Runs, their metrics, and logs.

    A run belongs to one tenant, and so do its metrics: what walks the index of metrics goes by the run's id alone, and
    rows are then read with the tenant.

    Where an `attempt` is given, by the id of its job and its number, that is who writes: nothing is changed, and False
    is returned, if it is not open any more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # Metrics

    def add_metrics(
        self, tenant: str, run_id: str, values: Sequence[tuple[str, int, float]], attempt: tuple[int, int] | None = None
    ) -> bool:
        """Adds (name, step, value) triples to a run, in one transaction; infinite values and NaN are left out."""
        time = now()
        points = [Metric(run_id, name, step, value, time) for name, step, value in values if math.isfinite(value)]
        if attempt is None:
            self.add_points(tenant, points)
            return True
        with writing(self._engine) as connection:
            if not _is_open(connection, attempt):
                return False
            if points:
                connection.execute(insert(metrics), [_row(tenant, point) for point in points])
        return True

    def add_points(self, tenant: str, points: Sequence[Metric]) -> None:
        """Adds values of all kinds, with their own times, in one transaction."""
        if points:
            with self._engine.begin() as connection:
                connection.execute(insert(metrics), [_row(tenant, point) for point in points])

    def add_after(self, tenant: str, run_id: str, points: Callable[[dict[str, int]], Sequence[Metric]]) -> None:
        """Adds the values that `points` makes of the greatest step of each metric so far, in one transaction.

        No two calls for a run are given the same steps. What `points` raises leaves the run as it was.
        """
        newest = metrics.c.id.in_(select(_lasts(run_id).c.id))
        query = select(metrics.c.name, metrics.c.step).where(metrics.c.tenant == tenant, newest)
        with writing(self._engine) as connection:
            hold(connection, f"steps of {run_id}")
            rows = points({row.name: row.step for row in connection.execute(query)})
            if rows:
                connection.execute(insert(metrics), [_row(tenant, point) for point in rows])

    def metrics(
        self,
        tenant: str,
        run_id: str,
        name: str | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        max_points: int = MAX_POINTS,
    ) -> list[Metric]:
        """The values of a run, of one name and between two steps if these are given, in the order of their steps.

        Where there are more than `max_points`, the names with the most of them are thinned out, each evenly by the
        number of its values, and its first and last are kept. There can be more than `max_points` only if that is
        less than two for each name. The database does it along its index: a million values are never read whole.
        """
        wanted = metrics.c.run_id == run_id
        if name is not None:
            wanted &= metrics.c.name == name
        elif from_step is not None or to_step is not None:
            # Behind each name the index has the steps in their order.
            wanted &= metrics.c.name.in_(select(_names(run_id).c.name))
        if from_step is not None:
            wanted &= metrics.c.step >= from_step
        if to_step is not None:
            wanted &= metrics.c.step <= to_step
        with self._engine.connect() as connection:
            counting = select(metrics.c.name, func.count().label("points")).where(wanted).group_by(metrics.c.name)
            counts = {row.name: row.points for row in connection.execute(counting)}
            kept = _shares(counts, max_points)
            thinned = [found for found, count in counts.items() if kept[found] < count]
            if thinned:
                whole = [found for found in counts if found not in thinned]
                rows = _read(connection, tenant, wanted & metrics.c.name.in_(whole), max_points)
                for found in thinned:
                    of_name = _thinned(wanted & (metrics.c.name == found), counts[found], kept[found])
                    rows += _read(connection, tenant, metrics.c.id.in_(of_name), max_points)
            else:
                rows = _read(connection, tenant, wanted, max_points)
        return [_metric(row) for row in sorted(rows, key=lambda row: (row.step, row.id))]

    def newest_metrics(self, tenant: str, run_id: str) -> dict[str, float]:
        """The value of each metric of a run at its greatest step, where that is a number."""
        query = select(metrics.c.name, metrics.c.value).where(
            metrics.c.tenant == tenant, metrics.c.id.in_(select(_lasts(run_id).c.id)), metrics.c.value.is_not(None)
        )
        with self._engine.connect() as connection:
            return {row.name: row.value for row in connection.execute(query)}

    def drop_metrics(
        self,
        tenant: str,
        run_id: str,
        after_step: int,
        names: Collection[str],
        attempt: tuple[int, int] | None = None,
    ) -> bool:
        """Removes the values of these names behind a step of a run, which is gone on from."""
        of_run = (metrics.c.tenant == tenant) & (metrics.c.run_id == run_id)
        behind = of_run & metrics.c.name.in_(names) & (metrics.c.step > after_step)
        with writing(self._engine) as connection:
            if attempt is not None and not _is_open(connection, attempt):
                return False
            connection.execute(delete(metrics).where(behind))
        return True

    # Runs

    def run(self, tenant: str, run_id: str) -> Run | None:
        if "\0" in run_id:  # PostgreSQL would not even look for it
            return None
        query = select(runs).where(runs.c.tenant == tenant, runs.c.id == run_id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return Run(**found) if found else None

    def run_experiment(self, tenant: str, run_id: str) -> str:
        """The id of the experiment that a run belongs to."""
        query = select(runs.c.experiment_id).where(runs.c.tenant == tenant, runs.c.id == run_id)
        with self._engine.connect() as connection:
            return str(connection.execute(query).scalar_one())

    # Logs

    def add_logs(
        self,
        tenant: str,
        run_id: str,
        lines: Sequence[tuple[str, str, str]],
        attempt: tuple[int, int] | None = None,
    ) -> bool:
        """Adds (timestamp, level, message) triples to the log of a run."""
        messages = [Message(time, level, message, {}) for time, level, message in lines]
        return self.add_messages(tenant, messages, run_id, attempt=attempt)

    def add_messages(
        self,
        tenant: str,
        messages: Sequence[Message],
        run_id: str | None = None,
        trace_id: str | None = None,
        attempt: tuple[int, int] | None = None,
    ) -> bool:
        """Adds messages to the log of a run, of a trace, or of neither, in one transaction."""
        of = dict(tenant=tenant, run_id=run_id, trace_id=trace_id)
        with writing(self._engine) as connection:
            if run_id is not None:
                # Ids are given in the order of the commits: who follows a log goes on behind the greatest one seen.
                hold(connection, f"log of {run_id}")
            if attempt is not None and not _is_open(connection, attempt):
                return False
            if messages:
                connection.execute(insert(logs), [of | vars(message) for message in messages])
        return True

    def logs_after(self, tenant: str, run_id: str, after: int, limit: int) -> list[Log]:
        """The lines of a run's log behind the one with the id `after`, in the order in which they were written."""
        query = _logs(tenant).where(logs.c.run_id == run_id, logs.c.id > after)
        with self._engine.connect() as connection:
            return [Log(**row) for row in connection.execute(query.order_by(logs.c.id).limit(limit)).mappings()]

    def logs_of_trace(
        self, tenant: str, trace_id: str, limit: int, *, only: str | None = None, without: str | None = None
    ) -> list[Log]:
        """The logs of a trace in the order of their arrival, of one level or of all but one."""
        query = _logs(tenant).where(logs.c.trace_id == trace_id)
        if only is not None:
            query = query.where(logs.c.level == only)
        if without is not None:
            query = query.where(logs.c.level != without)
        with self._engine.connect() as connection:
            return [Log(**row) for row in connection.execute(query.order_by(logs.c.id).limit(limit)).mappings()]

    def search_logs(
        self,
        tenant: str,
        text: str = "",
        *,
        of: Mapping[str, str] = {},
        levels: Sequence[str] | None = None,
        since: str | None = None,
        until: str | None = None,
        before_id: int | None = None,
        limit: int = 100,
    ) -> list[Log]:
        """The logs that hold a text, newest first: those that arrived last.

        `of` are columns that must have a value: run_id, trace_id. Levels are in lower case. The times are those of the
        logs themselves: `since` or later, and before `until`. A page ends before the log with the id `before_id`.
        """
        query = _logs(tenant).where(*(logs.c[column] == value for column, value in of.items()))
        if text:
            query = query.where(logs.c.message.icontains(text, autoescape=True))
        if levels is not None:
            query = query.where(func.lower(logs.c.level).in_(levels))
        if since is not None:
            query = query.where(logs.c.timestamp >= since)
        if until is not None:
            query = query.where(logs.c.timestamp < until)
        if before_id is not None:
            query = query.where(logs.c.id < before_id)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(logs.c.id.desc()).limit(limit)).mappings()
            return [Log(**row) for row in rows]


def _is_open(connection: Connection, attempt: tuple[int, int]) -> bool:
    """Whether an attempt is open, and stays so to the end of this transaction, which is a `writing` one."""
    job_id, number = attempt
    mine = (attempts.c.job_id == job_id) & (attempts.c.number == number) & attempts.c.ended_at.is_(None)
    return connection.execute(select(attempts.c.number).where(mine).with_for_update(read=True)).first() is not None


def _row(tenant: str, point: Metric) -> dict[str, Any]:
    """A number stands in `value`; what a float cannot say exactly (an integer, a text, true, false) in `other`."""
    value = point.value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return dict(
        tenant=tenant,
        run_id=point.run_id,
        name=point.name,
        step=point.step,
        value=float(value) if is_number else None,
        other=None if isinstance(value, float) else value,
        timestamp=point.timestamp,
    )


def _metric(row: Row[Any]) -> Metric:
    return Metric(row.run_id, row.name, row.step, row.value if row.other is None else row.other, row.timestamp)


def _read(connection: Connection, tenant: str, wanted: Any, most: int) -> list[Row[Any]]:
    query = select(metrics).where(metrics.c.tenant == tenant, wanted)
    return list(connection.execute(query.order_by(metrics.c.step, metrics.c.id).limit(most)))


def _shares(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """How many values of each name are kept: what those with few leave over goes to the others."""
    kept: dict[str, int] = {}
    for name, count in sorted(counts.items(), key=lambda entry: entry[1]):
        share = (most - sum(kept.values())) // (len(counts) - len(kept))
        kept[name] = min(count, max(2, share))
    return kept


def _thinned(of_name: Any, count: int, kept: int) -> Any:
    """A query of the ids of `kept` of the first `count` values of a name, evenly spaced, with the first and the last.

    The values numbered i from 0 are kept at which i * (kept - 1) / (count - 1) passes a whole number.
    """
    number = func.row_number().over(order_by=(metrics.c.step, metrics.c.id)) - 1
    numbered = select(metrics.c.id, number.label("number")).where(of_name).subquery()
    passes = (numbered.c.number * (kept - 1)) % (count - 1) < kept - 1
    return select(numbered.c.id).where(passes, numbered.c.number < count)


def _names(run_id: str) -> Any:
    """The names of a run's metrics. It skips along the index from one to the next, and reads no more of it."""
    of_run = metrics.c.run_id == run_id
    names = select(func.min(metrics.c.name).label("name")).where(of_run).cte(recursive=True)
    following = select(func.min(metrics.c.name)).where(of_run, metrics.c.name > names.c.name).scalar_subquery()
    names = names.union_all(select(following).where(names.c.name.is_not(None)))
    return select(names.c.name).where(names.c.name.is_not(None)).subquery()


def _lasts(run_id: str) -> Any:
    """The id of the value at the greatest step of each name of a run; of two there, that of the later one."""
    names = _names(run_id)
    of_name = select(metrics.c.id).where(metrics.c.run_id == run_id, metrics.c.name == names.c.name)
    last = of_name.order_by(metrics.c.step.desc(), metrics.c.id.desc()).limit(1)
    return select(last.scalar_subquery().label("id")).select_from(names).subquery()


def _logs(tenant: str) -> Any:
    columns = (logs.c.id, logs.c.run_id, logs.c.timestamp, logs.c.level, logs.c.message, logs.c.additional_info)
    return select(*columns, logs.c.trace_id).where(logs.c.tenant == tenant)
