"""The rows of experiments and of their runs. Those of a run's metrics and logs are in stack/store/telemetry.py."""

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, Table, insert, select, update
from sqlalchemy.exc import IntegrityError

from stack.store.connection import now, writing
from stack.store.paging import is_behind
from stack.store.schema import experiments, runs
from stack.store.telemetry import Run

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A row of `experiments`."""

    id: str
    tenant: str
    name: str
    status: str
    metadata: Metadata
    created_at: str
    updated_at: str


class Experiments:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, tenant: str, name: str, metadata: Metadata) -> Experiment:
        """Opens an experiment; if the name is taken, the one that has it."""
        time = now()
        experiment = Experiment(uuid.uuid4().hex, tenant, name, "not_started", metadata, time, time)
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(experiments).values(**asdict(experiment)))
        except IntegrityError:
            with self._engine.connect() as connection:
                query = select(experiments).where(experiments.c.tenant == tenant, experiments.c.name == name)
                found = connection.execute(query).mappings().first()
            if found is None:
                raise  # it was not the name
            return Experiment(**found)
        return experiment

    def get(self, tenant: str, id: str) -> Experiment | None:
        with self._engine.connect() as connection:
            found = connection.execute(select(experiments).where(_is(experiments, tenant, id))).mappings().first()
        return Experiment(**found) if found else None

    def page(self, tenant: str, after: Experiment | None, limit: int) -> list[Experiment]:
        """The experiments of a tenant, newest first, behind this one."""
        query = select(experiments).where(experiments.c.tenant == tenant)
        if after is not None:
            query = query.where(is_behind(experiments.c.created_at, experiments.c.id, after.created_at, after.id))
        query = query.order_by(experiments.c.created_at.desc(), experiments.c.id.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [Experiment(**row) for row in connection.execute(query).mappings()]

    def change(
        self, tenant: str, id: str, status: str | None, metadata: Callable[[Metadata], Metadata]
    ) -> Experiment | None:
        """Changes an experiment; `metadata` makes the new ones of the old. None if it is not there."""
        mine = _is(experiments, tenant, id)
        with writing(self._engine) as connection:
            found = connection.execute(select(experiments).where(mine).with_for_update()).mappings().first()
            if found is None:
                return None
            values = dict(metadata=metadata(found["metadata"]), status=status or found["status"], updated_at=now())
            connection.execute(update(experiments).where(mine).values(**values))
        return Experiment(**{**found, **values})

    def add_run(self, tenant: str, experiment_id: str, metadata: Metadata) -> Run:
        run = Run(uuid.uuid4().hex, tenant, experiment_id, "running", metadata, started_at=now(), ended_at=None)
        with self._engine.begin() as connection:
            connection.execute(insert(runs).values(**asdict(run)))
        return run

    def page_of_runs(self, tenant: str, experiment_id: str, after: Run | None, limit: int) -> list[Run]:
        """The runs of an experiment, those that started last first, behind this one."""
        query = select(runs).where(runs.c.tenant == tenant, runs.c.experiment_id == experiment_id)
        if after is not None:
            query = query.where(is_behind(runs.c.started_at, runs.c.id, after.started_at, after.id))
        query = query.order_by(runs.c.started_at.desc(), runs.c.id.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [Run(**row) for row in connection.execute(query).mappings()]

    def change_run(
        self, tenant: str, id: str, status: str | None, ended_at: str | None, metadata: Callable[[Metadata], Metadata]
    ) -> Run | None:
        """Changes a run; `metadata` makes the new ones of the old. None if it is not there."""
        mine = _is(runs, tenant, id)
        with writing(self._engine) as connection:
            found = connection.execute(select(runs).where(mine).with_for_update()).mappings().first()
            if found is None:
                return None
            values: dict[str, Any] = {"metadata": metadata(found["metadata"])}
            # A job may change these two of its run meanwhile, so they are written only where they are given.
            values |= {"status": status} if status is not None else {}
            values |= {"ended_at": ended_at} if ended_at is not None else {}
            connection.execute(update(runs).where(mine).values(**values))
        return Run(**{**found, **values})


def _is(table: Table, tenant: str, id: str) -> ColumnElement[bool]:
    mine: ColumnElement[bool] = (table.c.tenant == tenant) & (table.c.id == id)
    return mine
