"""The rows of jobs and of the attempts at them.

Each step of the state machine is one transaction that has taken the job first, so that the steps of a job follow one
another and each sees what the one before has left: see `_taken`.

An attempt that is not open any more (its `ended_at` is set) can change nothing of its job: a driver that was given up
for dead and lives on, on a node that was cut off, say, finds that out with its next heartbeat. Until then it may add
metrics and log lines to the job's run, which only tell what happened.
"""

import uuid as uuids
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import Connection, Engine, Subquery, exists, func, insert, select, union_all, update
from sqlalchemy.exc import IntegrityError

from stack.api.jobs import JobStatus
from stack.store.adapters import Adapter
from stack.store.artifacts import Artifact
from stack.store.connection import hold, now, writing
from stack.store.models import AddedModel, add_if_free
from stack.store.schema import adapters, artifacts, attempts, experiments, jobs, runs

UNFINISHED = (JobStatus.scheduled, JobStatus.running)
# How many characters are kept of why a job or an attempt ended.
MAX_REASON = 10_000
# How `waiting_for` begins of a job whose last attempt was lost.
AFTER_LOSS = "another attempt, as the last one was lost: "


@dataclass(frozen=True)
class Job:
    """A row of `jobs`. `progress` holds done, total, unit; `furthest` the unit and done of the greatest progress, and
    the attempt that made it; `result` what its kind of job keeps when it is completed."""

    id: int
    tenant: str
    uuid: str
    kind: str
    request: dict[str, Any]
    priority: int
    bundles: list[dict[str, float]]
    run_id: str
    status: str
    waiting_for: str | None
    cancelled_at: str | None
    scheduled_at: str
    started_at: str | None
    completed_at: str | None
    resources_allocated: dict[str, Any] | None
    progress: dict[str, Any] | None
    furthest: dict[str, Any] | None
    checkpoints: list[dict[str, Any]] | None
    result: dict[str, Any] | None
    error: str | None
    trace: str | None


@dataclass(frozen=True)
class Entry:
    """What a list of jobs says of each. The other columns are large: a request may be megabytes."""

    id: int
    uuid: str
    kind: str
    status: str
    scheduled_at: str
    started_at: str | None
    completed_at: str | None


@dataclass(frozen=True)
class Attempt:
    """A row of `attempts`: one Ray job that runs the driver of a job."""

    job_id: int
    number: int
    submission_id: str
    heartbeat: int
    started_at: str
    ended_at: str | None
    exit_reason: str | None
    retryable: bool | None
    cluster: str | None = None


@dataclass(frozen=True)
class NewJob:
    """What is known of a job when it is accepted. `experiment` is the name of the one that its run belongs to."""

    tenant: str
    uuid: str
    kind: str
    request: dict[str, Any]
    experiment: str
    priority: int = 0
    bundles: Sequence[dict[str, float]] = ()
    trace: str | None = None


@dataclass(frozen=True)
class Waiting:
    """A job that has no attempt under way: what is needed to choose among them.

    Of its `attempts`, the drivers of `begun` have begun to work; of `stalled` since the job last got further, the one
    that did included.
    """

    id: int
    tenant: str
    uuid: str
    kind: str
    priority: int
    bundles: list[dict[str, float]]
    waiting_for: str | None
    trace: str | None
    attempts: int
    begun: int
    stalled: int
    last_ended_at: str | None


class Jobs:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # Accepting, looking up, cancelling

    def add(self, job: NewJob, max_waiting: int, submission_id: str | None = None) -> tuple[Job | None, bool]:
        """Accepts a job and opens its run.

        With a submission id, it is one whose first attempt a user has submitted to Ray already. Returns the job of
        this uuid and whether it is new; None if the tenant has `max_waiting` waiting jobs already.
        """
        with writing(self._engine) as connection:
            # One after another, so that none is counted twice or not at all.
            hold(connection, f"llama-stack-ray: jobs of {job.tenant}")
            query = select(jobs).where(jobs.c.tenant == job.tenant, jobs.c.uuid == job.uuid)
            if known := connection.execute(query).mappings().first():
                return Job(**known), False
            if submission_id is None and _waiting_of(connection, job.tenant) >= max_waiting:
                return None, False
            job_id = _insert(connection, job)
            if submission_id is not None:
                _open_attempt(connection, job_id, 1, submission_id)
            return Job(**connection.execute(query).mappings().one()), True

    def get(self, tenant: str, uuid: str) -> Job | None:
        with self._engine.connect() as connection:
            query = select(jobs).where(jobs.c.tenant == tenant, jobs.c.uuid == uuid)
            found = connection.execute(query).mappings().first()
        return Job(**found) if found else None

    def has_ended(self, job_id: int) -> bool:
        query = select(jobs.c.status).where(jobs.c.id == job_id)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one() not in UNFINISHED

    def unfinished(self, tenant: str, kinds: Sequence[str]) -> Generator[tuple[str, str, dict[str, Any]]]:
        """The uuid, kind and request of each job of these kinds that has not ended."""
        query = select(jobs.c.uuid, jobs.c.kind, jobs.c.request).where(
            jobs.c.tenant == tenant, jobs.c.kind.in_(kinds), jobs.c.status.in_(UNFINISHED)
        )
        # A few at a time, as requests may be megabytes.
        query = query.execution_options(yield_per=10)
        with self._engine.connect() as connection, connection.execute(query) as rows:
            for row in rows:
                yield row.uuid, row.kind, row.request

    def statuses(self, tenant: str, uuids: Sequence[str]) -> dict[str, str]:
        """How those of these jobs stand that there are."""
        query = select(jobs.c.uuid, jobs.c.status).where(jobs.c.tenant == tenant, jobs.c.uuid.in_(uuids))
        with self._engine.connect() as connection:
            return {row.uuid: row.status for row in connection.execute(query)}

    def page(
        self, tenant: str, kinds: Sequence[str], status: str | None = None, after: int | None = None, limit: int = 100
    ) -> list[Entry]:
        """The jobs of these kinds, newest first; `after` is the id of the last one of the page before."""
        # Each kind's along an index, which has them in their order: of many thousand jobs none other is read.
        pages = [_newest(tenant, kind, status, after, limit) for kind in kinds]
        ids = union_all(*(select(page.c.id) for page in pages))
        with self._engine.connect() as connection:
            columns = [jobs.c[field.name] for field in fields(Entry)]
            query = select(*columns).where(jobs.c.id.in_(ids)).order_by(jobs.c.id.desc()).limit(limit)
            return [Entry(*row) for row in connection.execute(query)]

    def attempts(self, job_id: int) -> list[Attempt]:
        """The attempts at a job, in their order."""
        query = select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number)
        with self._engine.connect() as connection:
            return [Attempt(**row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[tuple[str, str, str], int]:
        """How many jobs there are of each (tenant, kind, status), of all tenants."""
        columns = (jobs.c.tenant, jobs.c.kind, jobs.c.status)
        query = select(*columns, func.count()).group_by(*columns)
        with self._engine.connect() as connection:
            return {(tenant, kind, status): count for tenant, kind, status, count in connection.execute(query)}

    def attempt_counts(self) -> dict[str, int]:
        """How many attempts at jobs of all tenants are under way, were lost, and have ended otherwise."""
        under_way = func.count().filter(attempts.c.ended_at.is_(None))
        query = select(func.count(), under_way, func.count().filter(attempts.c.retryable))
        with self._engine.connect() as connection:
            total, open_ones, lost = connection.execute(query.select_from(attempts)).one()
        return {"under way": open_ones, "lost": lost, "ended": total - open_ones - lost}

    def cancel(self, tenant: str, uuid: str) -> None:
        """Asks that a job be cancelled. One without an attempt under way is cancelled at once."""
        job = self.get(tenant, uuid)
        if job is None:
            return
        with self._taken(job.id) as connection:
            unfinished = (jobs.c.id == job.id) & jobs.c.status.in_(UNFINISHED)
            asked = update(jobs).where(unfinished, jobs.c.cancelled_at.is_(None))
            connection.execute(asked.values(cancelled_at=now()))
            if not _has_open_attempt(connection, job.id):
                _end(connection, job.id, JobStatus.cancelled)

    # What the job supervisor does, for all tenants

    def waiting(self, limit: int = 1_000) -> list[Waiting]:
        """The jobs of all tenants that have no attempt under way and are not to be cancelled, oldest first.

        Of each tenant at most `limit`: no tenant's jobs stay unseen behind those of others.
        """
        waits = (jobs.c.status == JobStatus.scheduled) & jobs.c.cancelled_at.is_(None)
        place = func.row_number().over(partition_by=jobs.c.tenant, order_by=(jobs.c.priority.desc(), jobs.c.id))
        placed = select(jobs.c.id, place.label("place")).where(waits).subquery()
        columns = (jobs.c.id, jobs.c.tenant, jobs.c.uuid, jobs.c.kind, jobs.c.priority, jobs.c.bundles)
        tried, begun = func.count(attempts.c.number), attempts.c.heartbeat > 0
        furthest = func.coalesce(jobs.c.furthest["attempt"].as_integer(), 0)
        query = select(
            *columns,
            jobs.c.waiting_for,
            jobs.c.trace,
            tried.label("attempts"),
            func.count().filter(begun).label("begun"),
            func.count().filter(begun, attempts.c.number >= furthest).label("stalled"),
            func.max(attempts.c.ended_at).label("last_ended_at"),
        ).join_from(jobs, attempts, attempts.c.job_id == jobs.c.id, isouter=True)
        query = query.where(jobs.c.id.in_(select(placed.c.id).where(placed.c.place <= limit)))
        # All attempts of theirs have ended, so that none is under way.
        query = query.group_by(jobs.c.id).having(tried == func.count(attempts.c.ended_at))
        with self._engine.connect() as connection:
            return [Waiting(*row) for row in connection.execute(query.order_by(jobs.c.id))]

    def under_way(self) -> list[tuple[Job, Attempt]]:
        """The jobs of all tenants that have an attempt under way, with that attempt."""
        with self._engine.connect() as connection:
            query = select(attempts).where(attempts.c.ended_at.is_(None)).order_by(attempts.c.job_id)
            found = [Attempt(**row) for row in connection.execute(query).mappings()]
            if not found:
                return []
            rows = select(jobs).where(jobs.c.id.in_([attempt.job_id for attempt in found]))
            by_id = {row["id"]: Job(**row) for row in connection.execute(rows).mappings()}
        return [(by_id[attempt.job_id], attempt) for attempt in found]

    def open_attempt(self, job_id: int, number: int, submission_id: str, cluster: str | None = None) -> bool:
        """Opens an attempt at a waiting job, on this cluster; False if it does not wait any more."""
        with self._taken(job_id) as connection:
            waits = (jobs.c.id == job_id) & (jobs.c.status == JobStatus.scheduled) & jobs.c.cancelled_at.is_(None)
            waiting = update(jobs).where(waits, ~_is_under_way()).values(waiting_for=None)
            # Another supervisor may have opened this one, and lost it too, since ours looked.
            if _has_attempt(connection, job_id, number) or connection.execute(waiting).rowcount != 1:
                return False
            _open_attempt(connection, job_id, number, submission_id, cluster)
        return True

    def set_waiting_for(self, job_id: int, reason: str | None) -> None:
        """Says why a job still waits."""
        with self._taken(job_id) as connection:
            waits = (jobs.c.id == job_id) & (jobs.c.status == JobStatus.scheduled) & ~_is_under_way()
            connection.execute(update(jobs).where(waits).values(waiting_for=reason))

    def lose_attempt(self, job_id: int, number: int, reason: str) -> bool:
        """Ends an attempt that was lost for no fault of the job: the job waits for another one.

        A job that is to be cancelled is cancelled by that.
        """
        with self._taken(job_id) as connection:
            if not _close_attempt(connection, job_id, number, reason, retryable=True):
                return False
            if _is_to_be_cancelled(connection, job_id):
                _end(connection, job_id, JobStatus.cancelled)
                return True
            waiting_for = _written(f"{AFTER_LOSS}{reason}")
            query = update(jobs).where(jobs.c.id == job_id, jobs.c.status.in_(UNFINISHED))
            connection.execute(query.values(status=JobStatus.scheduled, waiting_for=waiting_for))
            _follow(connection, job_id, status=JobStatus.scheduled)
        return True

    # What the driver of an attempt does

    def begin(self, job_id: int, number: int, resources: dict[str, Any]) -> bool:
        """scheduled -> running, by the driver of an open attempt that no other driver has begun.

        False also for a job that is to be cancelled: the supervisor ends it.
        """
        mine = (attempts.c.job_id == job_id) & (attempts.c.number == number)
        with self._taken(job_id) as connection:
            fresh = mine & attempts.c.ended_at.is_(None) & (attempts.c.heartbeat == 0)
            if _is_to_be_cancelled(connection, job_id):
                return False
            if connection.execute(update(attempts).where(fresh).values(heartbeat=1)).rowcount != 1:
                return False
            started_at = connection.execute(select(jobs.c.started_at).where(jobs.c.id == job_id)).scalar() or now()
            values = dict(status=JobStatus.running, started_at=started_at, waiting_for=None)
            query = update(jobs).where(jobs.c.id == job_id)
            connection.execute(query.values(resources_allocated=resources, **values))
            _follow(connection, job_id, status=JobStatus.running, started_at=started_at)
        return True

    def beat(self, job_id: int, number: int) -> bool:
        """Shows that an attempt's driver lives; False if the attempt has been given up."""
        mine = (attempts.c.job_id == job_id) & (attempts.c.number == number) & attempts.c.ended_at.is_(None)
        with self._engine.begin() as connection:
            beaten = update(attempts).where(mine).values(heartbeat=attempts.c.heartbeat + 1)
            return connection.execute(beaten).rowcount == 1

    def record(self, job_id: int, number: int, **values: Any) -> bool:
        """Writes `progress` or `checkpoints` of a job, by its attempt under way; False if that has been given up."""
        with self._taken(job_id) as connection:
            if (progress := values.get("progress")) is not None and _is_further(connection, job_id, progress):
                values["furthest"] = dict(unit=progress.get("unit"), done=progress["done"], attempt=number)
            query = update(jobs).where(jobs.c.id == job_id, _is_under_way(number)).values(**values)
            return connection.execute(query).rowcount == 1

    def complete(
        self, job_id: int, number: int, result: dict[str, Any],
        adapter: Adapter | None = None, artifact: Artifact | None = None, model: AddedModel | None = None,
        problem: str | None = None,
    ) -> bool:  # fmt: skip
        """running -> completed, and registers what the job has made; False if the attempt has been given up.

        What is done is done: a job that was to be cancelled is completed all the same. One whose model has an id that
        was taken meanwhile has failed: the row that is there stays. So has one with a `problem`. What they have made is
        kept.
        """
        with self._taken(job_id) as connection:
            if not _close_attempt(connection, job_id, number, "completed", retryable=False):
                return False
            if adapter is not None:
                connection.execute(insert(adapters).values(**asdict(adapter)))
            if artifact is not None:
                connection.execute(insert(artifacts).values(**asdict(artifact)))
            if problem is not None:
                kept = f"; what was made is kept as the artifact {artifact.path!r}" if artifact else ""
                _end(connection, job_id, JobStatus.failed, result=result, error=_written(f"{problem}{kept}"))
            elif model is None or add_if_free(connection, model):
                _end(connection, job_id, JobStatus.completed, result=result)
            else:
                kept = f"; what was trained is kept as the artifact {artifact.path!r}" if artifact else ""
                error = f"there is another model {model.id!r} by now, so that this one is not served{kept}"
                _end(connection, job_id, JobStatus.failed, error=_written(error), checkpoints=None)
        return True

    def fail(self, job_id: int, number: int, reason: str) -> bool:
        """scheduled or running -> failed, with the attempt; False if that has been given up.

        A job that is to be cancelled is cancelled: what is being stopped may fail by that.
        """
        with self._taken(job_id) as connection:
            if not _close_attempt(connection, job_id, number, reason, retryable=False):
                return False
            if _is_to_be_cancelled(connection, job_id):
                _end(connection, job_id, JobStatus.cancelled)
            else:
                _end(connection, job_id, JobStatus.failed, error=_written(reason))
        return True

    def give_up(self, job_id: int, reason: str) -> None:
        """scheduled -> failed, for a job that has no attempt under way and gets no other."""
        with self._taken(job_id) as connection:
            if not _has_open_attempt(connection, job_id):
                _end(connection, job_id, JobStatus.failed, error=_written(reason))

    def end_cancelled(self, job_id: int, number: int, reason: str) -> bool:
        """scheduled or running -> cancelled, when the attempt has been stopped."""
        with self._taken(job_id) as connection:
            closed = _close_attempt(connection, job_id, number, reason, retryable=False)
            if closed:
                _end(connection, job_id, JobStatus.cancelled)
        return closed

    @contextmanager
    def _taken(self, job_id: int) -> Iterator[Connection]:
        """A transaction that has a job to itself: nobody else changes its state or its attempts meanwhile.

        Heartbeats excepted, all changes of jobs and attempts are made in one.
        """
        with writing(self._engine) as connection:
            connection.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())
            yield connection


def _insert(connection: Connection, job: NewJob) -> int:
    """Adds the rows of a job and its run, and returns the job's id."""
    time, run_id = now(), uuids.uuid4().hex
    metadata = {"job_uuid": job.uuid, "kind": job.kind}
    run = dict(id=run_id, tenant=job.tenant, metadata=metadata, started_at=time, status=JobStatus.scheduled)
    experiment_id = _experiment(connection, job.tenant, job.experiment, time)
    connection.execute(insert(runs).values(experiment_id=experiment_id, **run))
    row = dict(
        tenant=job.tenant, uuid=job.uuid, kind=job.kind, request=job.request, priority=job.priority,
        bundles=list(job.bundles), trace=job.trace, run_id=run_id, status=JobStatus.scheduled, scheduled_at=time,
    )  # fmt: skip
    key = connection.execute(insert(jobs).values(**row)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _experiment(connection: Connection, tenant: str, name: str, time: str) -> str:
    """The id of a tenant's experiment of this name, which is made if there is none."""
    query = select(experiments.c.id).where(experiments.c.tenant == tenant, experiments.c.name == name)
    found = connection.execute(query).scalar()
    if found is None:
        row = dict(id=uuids.uuid4().hex, tenant=tenant, name=name, status="running", metadata={})
        try:
            with connection.begin_nested():
                connection.execute(insert(experiments).values(created_at=time, updated_at=time, **row))
        except IntegrityError:  # another job's first was faster
            found = connection.execute(query).scalar_one()
        else:
            found = row["id"]
    return str(found)


def _newest(tenant: str, kind: str, status: str | None, after: int | None, limit: int) -> Subquery:
    query = select(jobs.c.id).where(jobs.c.tenant == tenant, jobs.c.kind == kind)
    if status is not None:
        query = query.where(jobs.c.status == status)
    if after is not None:
        query = query.where(jobs.c.id < after)
    return query.order_by(jobs.c.id.desc()).limit(limit).subquery()


def _is_under_way(number: int | None = None) -> Any:
    """Whether the job of a row has an open attempt, or this one."""
    query = exists().where(attempts.c.job_id == jobs.c.id, attempts.c.ended_at.is_(None))
    return query if number is None else query.where(attempts.c.number == number)


def _waiting_of(connection: Connection, tenant: str) -> int:
    waits = (jobs.c.tenant == tenant) & (jobs.c.status == JobStatus.scheduled)
    return int(connection.execute(select(func.count()).select_from(jobs).where(waits)).scalar_one())


def _has_open_attempt(connection: Connection, job_id: int) -> bool:
    query = select(attempts.c.number).where(attempts.c.job_id == job_id, attempts.c.ended_at.is_(None))
    return connection.execute(query).first() is not None


def _has_attempt(connection: Connection, job_id: int, number: int) -> bool:
    query = select(attempts.c.number).where(attempts.c.job_id == job_id, attempts.c.number == number)
    return connection.execute(query).first() is not None


def _is_to_be_cancelled(connection: Connection, job_id: int) -> bool:
    return connection.execute(select(jobs.c.cancelled_at).where(jobs.c.id == job_id)).scalar() is not None


def _is_further(connection: Connection, job_id: int, progress: dict[str, Any]) -> bool:
    """Whether a job has not been that far: what it does next, which has another unit, begins at 0."""
    known = connection.execute(select(jobs.c.furthest).where(jobs.c.id == job_id)).scalar()
    before = known["done"] if known is not None and known["unit"] == progress.get("unit") else 0
    return bool(progress["done"] > before)


def _open_attempt(
    connection: Connection, job_id: int, number: int, submission_id: str, cluster: str | None = None
) -> None:
    row = dict(job_id=job_id, number=number, submission_id=submission_id, heartbeat=0, started_at=now())
    connection.execute(insert(attempts).values(**row, cluster=cluster))


def _close_attempt(connection: Connection, job_id: int, number: int, reason: str, *, retryable: bool) -> bool:
    mine = (attempts.c.job_id == job_id) & (attempts.c.number == number) & attempts.c.ended_at.is_(None)
    values = dict(ended_at=now(), exit_reason=_written(reason), retryable=retryable)
    return connection.execute(update(attempts).where(mine).values(**values)).rowcount == 1


def _end(connection: Connection, job_id: int, status: JobStatus, **values: Any) -> None:
    """Ends a job that has not ended yet, and its run."""
    time = now()
    mine = (jobs.c.id == job_id) & jobs.c.status.in_(UNFINISHED)
    ended = update(jobs).where(mine).values(status=status, completed_at=time, waiting_for=None, **values)
    if connection.execute(ended).rowcount == 1:
        _follow(connection, job_id, status=status, ended_at=time)


def _written(reason: str) -> str:
    """A reason as it can be kept: errors may quote anything, and PostgreSQL takes no NUL and no half characters."""
    kept = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} …"
    return kept.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _follow(connection: Connection, job_id: int, **values: Any) -> None:
    """Writes into a job's run what has become of the job."""
    run_id = select(jobs.c.run_id).where(jobs.c.id == job_id).scalar_subquery()
    connection.execute(update(runs).where(runs.c.id == run_id).values(**values))
