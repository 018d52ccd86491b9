"""How fast jobs are among many: status, list and submission over HTTP, the supervisor's look, metrics while training.

    scripts/bench jobs [--json FILE] [--store ADDRESS] [--only http|supervisor|metrics]

Fills a store of its own with jobs of five tenants that have ended (each with two attempts, a run, 20 metrics and 5 log
lines) and with jobs that wait. No Ray is started, and no model. The exit status is 1 if a target is missed.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ray.job_submission import JobDetails, JobStatus, JobType
from sqlalchemy import event, func, insert, select, text

from jobs.reporter import Metrics
from scripts.figures import Figure, figure, write_json, write_table
from serve_apps.attempts import Attempts
from stack import keys
from stack.config import Config
from stack.context import SCOPES, Context
from stack.jobs import EVALUATE, PREFERENCE_OPTIMIZE, SUPERVISED_FINE_TUNE
from stack.store import Store, now
from stack.store import schema as tables
from stack.store.jobs import NewJob

FINISHED, WAITING, TENANTS = 10_000, 1_000, 5
LEVELS = (0, 1_000, FINISHED)  # of finished jobs, at which the supervisor is measured
METRICS, LINES = 20, 5
KINDS = (EVALUATE, SUPERVISED_FINE_TUNE, PREFERENCE_OPTIMIZE)  # of the finished jobs, in turns
ASKED, SUBMITTED, PASSES = 400, 200, 50
STATUS_MS, SUBMIT_MS = 20, 50  # targets, at the median
GROWTH = 1.25  # of the supervisor's look, from no finished jobs to all of them: noise, no growth
POINTS_A_MINUTE, SLOWER = 50_000, 2.0  # a training may be so many per cent slower for them
WINDOW_S, PAIRS = 3.0, 8
MODEL = {"id": "small", "path": "models/small", "context": 256}


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
        os.environ["STACK_HOME"] = folder
        config = Config.parse({"models": [MODEL], **({"store": arguments.store} if arguments.store else {})}, "config")
        store = Store(config.store_url)
        bench = Bench(config, store, Path(folder))
        figures: list[Figure] = []
        if arguments.only in (None, "supervisor", "http"):
            figures += bench.supervisor()
        if arguments.only in (None, "http"):
            figures += bench.http()
        if arguments.only in (None, "metrics"):
            figures += bench.metrics()
        database = store.engine.dialect.name
        store.close()
    print(f"{FINISHED:,} finished and {WAITING:,} waiting jobs of {TENANTS} tenants, {database}\n")
    print(write_table(figures))
    if arguments.json is not None:
        write_json(arguments.json, figures, bench="jobs", database=database)
    return 0 if all(one.met for one in figures) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench jobs", description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    parser.add_argument("--only", choices=["http", "supervisor", "metrics"], help="measure a part of it")
    parser.add_argument(
        "--store", metavar="ADDRESS", help="an empty PostgreSQL database to fill (default: a temporary SQLite file)"
    )
    return parser.parse_args()


class Bench:
    def __init__(self, config: Config, store: Store, home: Path) -> None:
        self._config = config
        self._store = store
        nodes = [{"CPU": 2.0, "GPU": 0.0}]
        self._attempts = Attempts(config, store, EndlessJobs, lambda: "nowhere", "bench", lambda: nodes, lambda _: None)
        self._home = home
        self._random = random.Random(1)  # the same at every run
        self._data = home / "data" / "questions.jsonl"
        self._data.parent.mkdir(parents=True)
        row = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        self._data.write_text(f"{json.dumps({'dialog': row})}\n" * 20)

    # The supervisor

    def supervisor(self) -> list[Figure]:
        """What its look at the store costs, once a second, with more and more jobs that have ended."""
        fill(self._store, 0, WAITING, self._request)
        self._attempts.reconcile()  # starts as many as may run
        assert len(self._store.jobs.under_way()) == self._config.max_running_jobs
        figures: list[Figure] = []
        least: list[float] = []
        finished = 0
        for level in LEVELS:
            fill(self._store, level - finished, 0, self._request)
            finished = level
            times = timed(self._attempts.reconcile, PASSES)
            least.append(min(times))
            figures.append(figure(f"supervisor's look, {level:,} finished, {WAITING:,} waiting", "ms", times))
        # By the quickest of each, in which nothing else on the machine has a part.
        figures.append(Figure("its growth from none to all finished", "times", least[-1] / least[0], most=GROWTH))
        if self._store.engine.dialect.name == "sqlite":
            figures.append(Figure("tables that it goes through whole", "", len(self._scans()), most=0))
        return figures

    def _scans(self) -> list[str]:
        """The tables that the queries of a look go through from end to end, by SQLite's own plans."""
        asked: list[tuple[str, Any]] = []

        def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
            if statement.startswith("SELECT"):
                asked.append((statement, parameters))

        event.listen(self._store.engine, "before_cursor_execute", note)
        self._attempts.reconcile()
        event.remove(self._store.engine, "before_cursor_execute", note)
        plans = []
        with self._store.engine.connect() as connection:
            for statement, parameters in asked:
                plans += [
                    str(row[-1]) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                ]
        # The index of the open attempts has none other.
        return [plan for plan in plans if re.match(r"SCAN (jobs|attempts|runs)\b(?!.* open_attempts)", plan)]

    # HTTP

    def http(self) -> list[Figure]:
        """What users wait for, from a gateway in a process of its own."""
        tokens = {name: keys.create(self._store, name, "bench", SCOPES)[1] for name in tenant_names()}
        with gateway(self._config) as url, httpx.Client(base_url=url, timeout=60) as client:

            def ask(method: str, path: str, tenant: str, **given: Any) -> None:
                headers = {"Authorization": f"Bearer {tokens[tenant]}"}
                reply = client.request(method, path, headers=headers, **given)
                assert reply.status_code == 200, reply.text

            def status(state: str) -> Callable[[], None]:
                def one() -> None:
                    tenant = self._random.choice(tenant_names())
                    job_uuid = self._random.choice(by_state[tenant, state])
                    ask("GET", "/evaluate/job/status", tenant, params={"job_uuid": job_uuid})

                return one

            def page(api: str, **params: str) -> Callable[[], None]:
                return lambda: ask("GET", f"/{api}/jobs", self._random.choice(tenant_names()), params=params)

            def behind() -> None:
                tenant = self._random.choice(tenant_names())
                after = self._random.choice(by_state[tenant, "completed"])
                ask("GET", "/evaluate/jobs", tenant, params={"after": after})

            def submit() -> None:
                body = self._request(uuid.uuid4().hex)
                ask("POST", "/evaluate/question_answering/", self._random.choice(tenant_names()), json=body)

            by_state = evaluations_by_state(self._store)
            asked: list[tuple[str, Callable[[], None], int, float]] = [
                ("status of a finished job", status("completed"), ASKED, STATUS_MS),
                ("status of a waiting job", status("scheduled"), ASKED, STATUS_MS),
                ("list, the first page of 100", page("evaluate"), ASKED, STATUS_MS),
                ("list, a page in the middle", behind, ASKED, STATUS_MS),
                ("list of two kinds", page("post_training"), ASKED, STATUS_MS),
                ("list, one of two kinds", page("post_training", kind=PREFERENCE_OPTIMIZE), ASKED, STATUS_MS),
                ("list, only waiting", page("evaluate", status="scheduled"), ASKED, STATUS_MS),
                ("list, only completed", page("evaluate", status="completed"), ASKED, STATUS_MS),
                ("list, only running: none", page("evaluate", status="running"), ASKED, STATUS_MS),
                ("submission", submit, SUBMITTED, SUBMIT_MS),
            ]
            return [figure(name, "ms", timed(do, times), most) for name, do, times, most in asked]

    def _request(self, job_uuid: str) -> dict[str, Any]:
        return {
            "job_uuid": job_uuid,
            "dataset": {"columns": {"dialog": "dialog"}, "content_url": self._data.as_uri()},
            "checkpoint": "small",
            "sampling_params": {"strategy": "greedy", "max_tokens": 8},
            "metrics": ["em"],
        }

    # Metrics

    def metrics(self) -> list[Figure]:
        """How much slower a training is that writes down so many points, in the same process."""
        new = NewJob("bench", "training", "evaluate", {}, experiment="bench")
        job, _ = self._store.jobs.add(new, max_waiting=10)
        assert job is not None
        assert self._store.jobs.open_attempt(job.id, 1, "training")
        train = training()
        train(WINDOW_S, None)
        written_s = 0.0
        with Metrics(self._store, job, 1) as metrics:
            slower: list[float] = []
            for _ in range(PAIRS):
                # In turns, each of the two first as often, so that a machine that slows down favours neither.
                orders = ((None, metrics), (metrics, None))
                speeds = {}
                for which in orders[len(slower) % 2]:
                    steps, seconds = train(WINDOW_S, which)
                    speeds[which] = steps / seconds
                    written_s += seconds if which else 0
                slower.append(100 * (speeds[None] / speeds[metrics] - 1))
        with self._store.engine.connect() as connection:
            query = select(func.count()).where(tables.metrics.c.run_id == job.run_id)
            rate = connection.execute(query).scalar_one() / written_s * 60
        name = f"training, slower by writing {rate:,.0f} points a minute"
        return [Figure(name, "%", statistics.median(slower), max(slower), SLOWER)]


class EndlessJobs:
    """A client of Ray's jobs, which all run, and take no time to ask for."""

    def get_version(self) -> str:
        return ""

    def list_jobs(self) -> list[JobDetails]:
        return []

    def get_job_info(self, job_id: str) -> JobDetails:
        return JobDetails(type=JobType.SUBMISSION, submission_id=job_id, entrypoint="", status=JobStatus.RUNNING)

    def stop_job(self, job_id: str) -> bool:
        raise AssertionError(f"nothing is to be stopped: {job_id}")

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        return submission_id


def tenant_names() -> list[str]:
    return [f"tenant-{number}" for number in range(TENANTS)]


def fill(store: Store, finished: int, waiting: int, request: Callable[[str], dict[str, Any]]) -> None:
    """Adds rows of jobs: those that have ended as their driver has left them, and those that nobody has begun."""
    rows: dict[str, list[dict[str, Any]]] = {"runs": [], "jobs": [], "attempts": [], "metrics": [], "logs": []}
    with store.engine.begin() as connection:
        known = connection.execute(select(func.coalesce(func.max(tables.jobs.c.id), 0))).scalar_one()
        experiments = _experiments(store)
        for number in range(finished + waiting):
            tenant = tenant_names()[number % TENANTS]
            _add_job(rows, known + 1 + number, tenant, experiments[tenant], request, ended=number < finished)
        for name, of_table in rows.items():
            if of_table:
                connection.execute(insert(tables.schema.tables[name]), of_table)
        if store.engine.dialect.name == "postgresql":
            connection.execute(text("SELECT setval(pg_get_serial_sequence('jobs', 'id'), (SELECT max(id) FROM jobs))"))


def _experiments(store: Store) -> dict[str, str]:
    """The experiment of each tenant's evaluations, by tenant."""
    with store.engine.begin() as connection:
        query = select(tables.experiments.c.tenant, tables.experiments.c.id)
        known = {row.tenant: row.id for row in connection.execute(query)}
        for tenant in set(tenant_names()) - known.keys():
            known[tenant] = uuid.uuid4().hex
            row = dict(id=known[tenant], tenant=tenant, name="evaluate", status="running", metadata={})
            connection.execute(insert(tables.experiments).values(created_at=now(), updated_at=now(), **row))
    return known


def _add_job(
    rows: dict[str, list[dict[str, Any]]],
    id: int,
    tenant: str,
    experiment_id: str,
    request: Callable[[str], dict[str, Any]],
    *,
    ended: bool,
) -> None:
    job_uuid, run_id, time_ = uuid.uuid4().hex, uuid.uuid4().hex, now()
    status = "completed" if ended else "scheduled"
    kind = KINDS[id // TENANTS % len(KINDS)] if ended else EVALUATE
    about = {"job_uuid": job_uuid, "kind": kind}
    run = dict(id=run_id, tenant=tenant, experiment_id=experiment_id, status=status, metadata=about, started_at=time_)
    rows["runs"].append(run)
    job = dict(
        id=id, tenant=tenant, uuid=job_uuid, kind=kind, request=request(job_uuid), priority=0,
        bundles=[{"CPU": 0.25}], run_id=run_id, status=status, scheduled_at=time_,
        started_at=time_ if ended else None, completed_at=time_ if ended else None,
        progress={"done": 20, "total": 20, "unit": "rows", "seconds_left": 0} if ended else None,
        result={"path": f"file:///evaluations/{job_uuid}", "files": []} if ended else None,
    )  # fmt: skip
    rows["jobs"].append(job)
    if not ended:
        return
    for number, reason in ((1, "the node died"), (2, "completed")):
        rows["attempts"].append(
            dict(
                job_id=id, number=number, submission_id=f"{tenant}.{job_uuid}.{number}", heartbeat=9,
                started_at=time_, ended_at=time_, exit_reason=reason, retryable=number == 1,
            )
        )  # fmt: skip
    of_run = dict(tenant=tenant, run_id=run_id, timestamp=time_)
    rows["metrics"] += [dict(of_run, name=f"metric-{n % 4}", step=n // 4, value=n / 7) for n in range(METRICS)]
    rows["logs"] += [dict(of_run, level="info", message=f"line {n}", additional_info={}) for n in range(LINES)]


def evaluations_by_state(store: Store) -> dict[tuple[str, str], list[str]]:
    """The uuids of the evaluations of each tenant in each state."""
    found: dict[tuple[str, str], list[str]] = {}
    with store.engine.connect() as connection:
        columns = (tables.jobs.c.tenant, tables.jobs.c.status, tables.jobs.c.uuid)
        query = select(*columns).where(tables.jobs.c.kind == EVALUATE)
        for tenant, status, job_uuid in connection.execute(query):
            found.setdefault((tenant, status), []).append(job_uuid)
    return found


def timed(do: Callable[[], None], times: int) -> list[float]:
    """How many milliseconds each of so many times took, after a few that do not count."""
    for _ in range(5):
        do()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        do()
        taken.append(1_000 * (time.perf_counter() - start))
    return taken


@contextmanager
def gateway(config: Config) -> Iterator[str]:
    """The gateway's application in another process, and its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(config, listening), daemon=True)
        process.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.terminate()
            process.join()


def _serve(config: Config, listening: socket.socket) -> None:
    import uvicorn

    from serve_apps.gateway import create_app

    async def ready() -> dict[str, str]:
        return {}

    app = create_app(Context.open(config), ready)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])


def training() -> Callable[[float, Metrics | None], tuple[int, float]]:
    """Something that trains for so many seconds, and returns how many steps it did in how many seconds."""
    import torch

    torch.manual_seed(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(64, 512)

    def train(seconds: float, metrics: Metrics | None) -> tuple[int, float]:
        start, steps, points = time.perf_counter(), 0, 0
        while (elapsed := time.perf_counter() - start) < seconds:
            loss = (model(batch) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if metrics is not None:
                due = int((time.perf_counter() - start) * POINTS_A_MINUTE / 60) - points
                metrics.log(steps, [(f"metric-{number}", float(number)) for number in range(due)])
                points += due
        return steps, elapsed

    return train


if __name__ == "__main__":
    sys.exit(main())
