"""The job supervisor: a Serve deployment of one replica that hands accepted jobs to Ray and watches the attempts.

It brings Ray's jobs in line with the store once a second: see serve_apps/attempts.py. So it does with the applications
of models that were added: see stack/added_models.py. It looks whether Ray is locked on nodes that join: see
serve_apps/node_locks.py. A new replica starts from the store, so nothing is lost when one dies. Once a day it sweeps
what interrupted uploads and jobs have left.
"""

import asyncio
import logging

import ray
from ray import serve
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient
from sqlalchemy.exc import SQLAlchemyError

from serve_apps.attempts import Attempts
from serve_apps.deployer import ServeDeployer
from serve_apps.node_locks import NodeLocks, addresses_of
from serve_apps.placement import ON_HEAD, addresses_by_id, alive_nodes, cluster
from serve_apps.replica_ports import listen_inside
from stack import experiments, jobs, made_datasets, tracing, uploads
from stack.added_models import Reconciler
from stack.config import Config
from stack.context import Context
from stack.errors import StackError
from stack.serve_controller import Controller
from stack.shared_state import require_one_home, require_shared
from stack.store import Job, faults

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
LOCKS_S = 10.0
SWEEP_S = 24 * 3600.0


listen_inside()


@serve.deployment(num_replicas=1, ray_actor_options={**ON_HEAD})
class JobSupervisor:
    def __init__(self, config: Config) -> None:
        tracing.start("job-supervisor", config.otlp_address)
        self._context = Context.open(config)
        self._attempts = Attempts(config, self._context.store, _connect, _address, cluster(), self._nodes, self._forget)
        self._models = Reconciler(config, self._context.store, ServeDeployer(Controller()))
        self._problem: str | None = None
        self._locks = NodeLocks(config.firewalled, addresses_of)
        self._unlocked: str | None = None
        loop = asyncio.get_running_loop()
        watching = (self._watch(), self._watch_models(), self._watch_locks())
        self._watchers = [loop.create_task(one) for one in watching]
        self._sweeper = loop.create_task(self._sweep_daily())

    def check_health(self) -> None:
        """Serve restarts a supervisor that has stopped watching."""
        for watcher in self._watchers:
            if watcher.done():
                watcher.result()

    async def problem(self) -> str | None:
        """Why jobs cannot be handed to Ray, and on how many nodes Ray is not locked, if that is so."""
        return "; ".join(one for one in (self._problem, self._unlocked) if one) or None

    def _nodes(self) -> list[dict[str, float]]:
        """What each node has. Raises BadInput where nodes have joined that do not reach what all share."""
        nodes = alive_nodes()
        require_shared(self._context.config, len(nodes))
        require_one_home(self._context.config, self._context.store, len(nodes))
        return nodes

    def _forget(self, job: Job) -> None:
        made_datasets.forget(self._context.of_tenant(job.tenant), job)

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._attempts.reconcile)
                self._problem = None
            except (OSError, RuntimeError, RayError, StackError, SQLAlchemyError) as error:
                # Ray or the database is away, or nodes share too little: jobs wait until that is over.
                self._problem = problem_of(error)
                logger.warning("%s: %s", self._problem, _words_of(error))
            await asyncio.sleep(INTERVAL_S)

    async def _watch_models(self) -> None:
        """Beside `_watch`, as building the application of a model takes a while."""
        while True:
            try:
                await asyncio.to_thread(self._models.reconcile)
            except (StackError, SQLAlchemyError) as error:  # Ray Serve or the database is away
                logger.warning("the added models cannot be looked after: %s", _words_of(error))
            await asyncio.sleep(INTERVAL_S)

    async def _watch_locks(self) -> None:
        """Beside `_watch`, as a node may take a while to answer."""
        while True:
            try:
                self._unlocked = await asyncio.to_thread(lambda: self._locks.look(addresses_by_id()))
            except (OSError, RuntimeError, RayError) as error:  # Ray is away
                logger.warning("it cannot be asked whether Ray is locked on its nodes: %s", error)
            await asyncio.sleep(LOCKS_S)

    async def _sweep_daily(self) -> None:
        while True:
            await asyncio.to_thread(self._sweep)
            await asyncio.sleep(SWEEP_S)

    def _sweep(self) -> None:
        try:
            for sweep in (uploads.sweep, experiments.sweep, jobs.sweep):
                for name in sweep(self._context):
                    logger.info("%s, which an interrupted upload or job has left, is removed", name)
        except (OSError, StackError, SQLAlchemyError) as error:  # tomorrow again
            logger.warning("the artifacts cannot be swept: %s", _words_of(error))


def problem_of(error: Exception) -> str:
    """What everybody may read of an error, whose own words may hold queries, what is in them, and addresses."""
    if isinstance(error, StackError):  # in our own words
        return f"jobs cannot be handed to Ray: {error.message}"
    who = "the database" if isinstance(error, SQLAlchemyError) else "Ray"
    return f"jobs cannot be handed to Ray: {who} does not answer as it should ({type(error).__name__})"


def _words_of(error: Exception) -> str:
    return faults.reason(error) if isinstance(error, SQLAlchemyError) else str(error)


def _connect() -> JobSubmissionClient:
    return JobSubmissionClient(_address())


def _address() -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address
