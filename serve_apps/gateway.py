"""The only public application: every route, behind request ids, bounds and one shape of errors."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from typing import Any

from fastapi import APIRouter, FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.routing import BaseRoute

from serve_apps.address import dashboard_hosts, interfaces, is_open, listening_host
from serve_apps.deployer import ServeDeployer
from serve_apps.errors import ENVELOPE_SCHEMA, add_error_handlers
from serve_apps.job_supervisor import JobSupervisor
from serve_apps.locks import require_locked
from serve_apps.memory_writer import MemoryWriter
from serve_apps.metrics import Measure, Metrics
from serve_apps.middleware import Admit, Authenticate, Bounds, Faults, RequestId, Trace
from serve_apps.placement import WAITS, addresses
from serve_apps.ray_sessions import RaySessions
from serve_apps.readiness import Readiness
from serve_apps.replica_ports import listen_inside
from serve_apps.routes import (
    agentic_system,
    batch_inference,
    datasets,
    evaluations,
    experiments,
    health,
    inference,
    memory_banks,
    metrics,
    models,
    openai,
    post_training,
    reward_scoring,
    safety,
    synthetic_data_generation,
    telemetry,
)
from serve_apps.session_pool import SessionPool
from stack import tracing
from stack.added_models import Deployer
from stack.agentic_system import look_ups
from stack.agentic_system.local_sessions import LocalSessions
from stack.agentic_system.loop import Place
from stack.agentic_system.sessions import Sessions
from stack.agentic_system.toolbox import open_tools
from stack.config import Config
from stack.context import Context
from stack.draining import longest_stream_s
from stack.keys import Keyring, is_loopback, require_keys
from stack.memory_banks.banks import Memory
from stack.memory_banks.serve_writer import ServeWriter
from stack.memory_banks.writer import BankWriter
from stack.serve_controller import Controller
from stack.serve_engine import ServeEngine
from stack.shared_state import require_one_home, require_shared
from stack.store import Store

# Routes are tried in this order, and inference and openai are asked most.
ROUTERS = (
    health,
    inference,
    openai,
    batch_inference,
    reward_scoring,
    safety,
    models,
    metrics,
    datasets,
    memory_banks,
    agentic_system,
    post_training,
    evaluations,
    synthetic_data_generation,
    experiments,
    telemetry,
)
REFUSED_AT_ONCE = 1_000
# What waits for the database, for the most part: Serve gives a deployment that has no CPU of its own no more than 5.
THREADS = 16


def build(args: dict[str, Any]) -> serve.Application:
    """The application `gateway` of a Serve config file, whose args are the stack's Config."""
    config = Config.parse(args, "args of the application 'gateway'")
    supervisor = JobSupervisor.bind(config)  # type: ignore[attr-defined]
    writer = MemoryWriter.bind(config)  # type: ignore[attr-defined]
    pool = SessionPool.bind(config)  # type: ignore[attr-defined]
    # More than are answered, so that those that are refused do not wait for it in front of the gateway.
    gateway = Gateway.options(  # type: ignore[attr-defined]
        max_ongoing_requests=config.max_requests + REFUSED_AT_ONCE,
        # One that is replaced ends the answers and turns that it has begun.
        graceful_shutdown_timeout_s=longest_stream_s(config),
    )
    return gateway.bind(config, supervisor, writer, pool)  # type: ignore[no-any-return]


listen_inside()


@serve.deployment(ray_actor_options={**WAITS})
@serve.ingress()
class Gateway:
    """Serves `create_app`'s application, which is made in the replica, where the store is."""

    def __init__(
        self,
        config: Config,
        supervisor: DeploymentHandle[Any],
        writer: DeploymentHandle[Any],
        pool: DeploymentHandle[Any],
    ) -> None:
        tracing.start("gateway", config.otlp_address)
        nodes = addresses()
        require_shared(config, len(nodes))
        self._controller = Controller()
        self._context = Context.open(config, ServeEngine(self._controller))
        self._context.artifacts.open()
        require_one_home(config, self._context.store, len(nodes))
        require_closed(config, self._context.store, nodes)
        self._ready = Readiness(config, self._controller, supervisor)
        self._memory = Memory.open(config, ServeWriter(writer))
        self._sessions = RaySessions(pool)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "gateway"))
        deployer = ServeDeployer(self._controller)
        return create_app(self._context, self._ready, deployer, self._memory, self._sessions)


def require_closed(config: Config, store: Store, nodes: Sequence[str]) -> None:
    """Raises Unauthorized where others could use the stack without a key, or Ray itself.

    `nodes` are the addresses of Ray's; of what else they have, that of this one and of the head is looked at here, and
    that of others by node_locks.py. On one, where nobody can be asked where Serve listens, middleware.Authenticate
    refuses other machines all the same. Of several, all but the head cannot ask: its dashboard is on its loopback.
    """
    host, are_several = listening_host(), len(nodes) > 1
    if host is not None or are_several:
        require_keys(store, host)
    if are_several or is_open(nodes) or (host is not None and not is_loopback(host)):
        require_locked(os.environ, nodes, dashboard_hosts(), interfaces(), firewalled=config.firewalled)


Ready = Callable[[], Awaitable[dict[str, str]]]


def create_app(
    context: Context,
    ready: Ready,
    deployer: Deployer | None = None,
    memory: Memory | None = None,
    sessions: Sessions | None = None,
) -> FastAPI:
    """Every route on a context. `ready` tells what is not ready yet. Ray Serve runs models, or another deployer.

    Memory banks are written by the writer of `memory` or, without one, in this process; and so are turns of agents run
    by `sessions`.
    """
    memory = memory or Memory.open(context.config, BankWriter(context.config, context.store))
    local_sessions = (
        LocalSessions(Place(context, look_ups.here(lambda: memory), open_tools)) if sessions is None else None
    )
    app = FastAPI(
        title="Llama Stack on Ray",
        description="The Llama Stack's APIs at the root, OpenAI's under /v1.",
        docs_url=None,
        redoc_url=None,
        lifespan=_closing(local_sessions),
    )
    app.state.context = context
    app.state.memory = memory
    app.state.sessions = sessions or local_sessions
    app.state.ready = ready
    app.state.deployer = deployer or ServeDeployer(Controller())
    app.state.metrics = Metrics(context.store)
    app.router.routes += _routes()
    add_error_handlers(app)
    app.add_middleware(Faults)
    app.add_middleware(Bounds, max_body_bytes=context.config.max_body_bytes, by_path=_larger_bodies(context.config))
    app.add_middleware(Admit, most=context.config.max_requests)
    app.add_middleware(Authenticate, keyring=Keyring(context.store))
    if context.config.otlp_address is not None:
        app.add_middleware(Trace)
    app.add_middleware(Measure, metrics=app.state.metrics)
    app.add_middleware(RequestId)
    _document_errors(app)
    return app


@cache
def _routes() -> list[BaseRoute]:
    """Made once in a process: that takes longer than all else of an application."""
    router = APIRouter()
    for one in ROUTERS:
        router.include_router(one.router)
    return router.routes


def _closing(sessions: LocalSessions | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The life of an application, with whose end the sessions that are its own leave their turns to others."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        if sessions is not None:
            await sessions.close()

    return life


def _larger_bodies(config: Config) -> dict[str, int]:
    """The bounds of the bodies in which files are sent: the file, in base64 or in multipart, and what stands beside."""
    return {
        "/memory_bank/insert": config.memory_banks.max_body_bytes,
        "/memory_bank/update": config.memory_banks.max_body_bytes,
        "/datasets/upload": config.max_dataset_bytes + 2**16,
        "/experiments/artifacts/upload": config.max_artifact_bytes * 4 // 3 + 2**20,
    }


def _document_errors(app: FastAPI) -> None:
    """Puts the one shape of errors into the OpenAPI document, in the place of FastAPI's own, which is for 422 only.

    It does not know of the keys either.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            schema = {"$ref": "#/components/schemas/Error"}
            for methods in document["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
                    error = {"description": "An error", "content": {"application/json": {"schema": schema}}}
                    operation["responses"]["default"] = error
            document["components"]["schemas"]["Error"] = ENVELOPE_SCHEMA
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
            for path in Authenticate.OPEN & document["paths"].keys():
                operation = document["paths"][path]["get"]
                operation["security"] = []
                del operation["responses"]["default"]  # a stack that starts says so in its own words
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
