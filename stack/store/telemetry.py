"""The rows of experiments, runs, metrics, logs and spans."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, delete, func, insert, select

from stack.store.connection import now
from stack.store.schema import logs, metrics, runs


@dataclass(frozen=True)
class Metric:
    """A value of a metric of a run at a step."""

    run_id: str
    name: str
    step: int
    value: float | str | bool
    timestamp: str


@dataclass(frozen=True)
class Log:
    id: int
    run_id: str | None
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
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add_metrics(self, tenant: str, run_id: str, values: Sequence[tuple[str, int, float]]) -> None:
        """Adds (name, step, value) triples to a run; infinite values and NaN are left out."""
        timestamp = now()
        rows = [
            dict(tenant=tenant, run_id=run_id, name=name, step=step, value=value, timestamp=timestamp)
            for name, step, value in values
            if math.isfinite(value)
        ]
        if rows:
            with self._engine.begin() as connection:
                connection.execute(insert(metrics), rows)

    def metrics(self, tenant: str, run_id: str) -> list[Metric]:
        """All values of a run, in the order of their steps."""
        columns = (metrics.c.run_id, metrics.c.name, metrics.c.step, metrics.c.value, metrics.c.timestamp)
        query = select(*columns).where(metrics.c.tenant == tenant, metrics.c.run_id == run_id)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(metrics.c.step, metrics.c.id)).mappings()
            return [Metric(**row) for row in rows]

    def newest_metrics(self, tenant: str, run_id: str) -> dict[str, float]:
        """The last number of each metric of a run."""
        of_run = (metrics.c.tenant == tenant) & (metrics.c.run_id == run_id) & metrics.c.value.is_not(None)
        newest = select(func.max(metrics.c.id)).where(of_run).group_by(metrics.c.name)
        query = select(metrics.c.name, metrics.c.value).where(metrics.c.id.in_(newest))
        with self._engine.connect() as connection:
            return {row.name: row.value for row in connection.execute(query)}

    def drop_metrics(self, tenant: str, run_id: str, after_step: int) -> None:
        """Removes the values of a run behind a step, which is gone on from."""
        behind = (metrics.c.tenant == tenant) & (metrics.c.run_id == run_id) & (metrics.c.step > after_step)
        with self._engine.begin() as connection:
            connection.execute(delete(metrics).where(behind))

    def run(self, tenant: str, run_id: str) -> Run | None:
        query = select(runs).where(runs.c.tenant == tenant, runs.c.id == run_id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return Run(**found) if found else None

    def run_experiment(self, tenant: str, run_id: str) -> str:
        """The id of the experiment that a run belongs to."""
        query = select(runs.c.experiment_id).where(runs.c.tenant == tenant, runs.c.id == run_id)
        with self._engine.connect() as connection:
            return str(connection.execute(query).scalar_one())

    def add_logs(self, tenant: str, run_id: str, lines: Sequence[tuple[str, str, str]]) -> None:
        """Adds (timestamp, level, message) triples to the log of a run."""
        if lines:
            rows = [
                dict(tenant=tenant, run_id=run_id, timestamp=time, level=level, message=message, additional_info={})
                for time, level, message in lines
            ]
            with self._engine.begin() as connection:
                connection.execute(insert(logs), rows)

    def logs_after(self, tenant: str, run_id: str, after: int, limit: int) -> list[Log]:
        """The lines of a run's log behind the one with the id `after`, in the order in which they were written."""
        columns = (logs.c.id, logs.c.run_id, logs.c.timestamp, logs.c.level, logs.c.message, logs.c.additional_info)
        query = select(*columns).where(logs.c.tenant == tenant, logs.c.run_id == run_id, logs.c.id > after)
        with self._engine.connect() as connection:
            return [Log(**row) for row in connection.execute(query.order_by(logs.c.id).limit(limit)).mappings()]
