"""The pool of sessions' actors: a Serve deployment of one replica, as only one may say which actor a session has.

The actors outlive it: a new replica finds them by their names.
"""

import asyncio
from contextlib import suppress
from typing import Any

import ray
from ray import serve

from serve_apps.actor_calls import NAMESPACE, answer_of
from serve_apps.actor_pool import PREFIX, Pool
from serve_apps.placement import WAITS, cluster
from serve_apps.pool_members import Keys, Member
from serve_apps.replica_ports import listen_inside
from serve_apps.session_actor import SessionActor
from stack import tracing
from stack.config import Config
from stack.store import Store

NAME = "SessionPool"  # of the deployment
# What Ray reserves for an actor. Where no node has it left, sessions wait for those of others.
MEMORY_BYTES = 150 * 2**20
CALLS = 10_000  # of an actor, at once


class RayActors:
    """Implements Actors."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def most_at_once(self) -> int:
        # To start, one takes all that a core can do, for seconds.
        resources = await asyncio.to_thread(ray.cluster_resources)
        return max(1, int(resources.get("CPU", 0)) // 2)

    async def launch(self, name: str) -> Any:
        handle = await asyncio.to_thread(self._started, name)
        try:
            await answer_of(handle.ready.remote())
        except BaseException:
            await self.kill(handle)
            raise
        return handle

    async def running(self) -> list[tuple[str, Any]]:
        return await asyncio.to_thread(self._found)

    async def kill(self, handle: Any) -> None:
        await asyncio.to_thread(ray.kill, handle)

    def _started(self, name: str) -> Any:
        actor = ray.remote(SessionActor).options(
            name=name, namespace=NAMESPACE, lifetime="detached", memory=MEMORY_BYTES,
            max_concurrency=CALLS, enable_task_events=False, **WAITS,
        )  # fmt: skip
        return actor.remote(self._config)

    def _found(self) -> list[tuple[str, Any]]:
        found = []
        for one in ray.util.list_named_actors(all_namespaces=True):
            if one["namespace"] == NAMESPACE and one["name"].startswith(PREFIX):
                with suppress(ValueError):  # it has ended meanwhile
                    found.append((one["name"], ray.get_actor(one["name"], NAMESPACE)))
        return found


listen_inside()


@serve.deployment(
    name=NAME,
    num_replicas=1,
    max_ongoing_requests=10_000,  # most of them wait for an actor
    ray_actor_options={**WAITS},
    health_check_period_s=2,  # no session gets an actor until it is noticed that the pool has died
)
class SessionPool:
    """The pool, as gateways ask it."""

    def __init__(self, config: Config) -> None:
        tracing.start("session-pool", config.otlp_address)
        self._pool = Pool(config, Store(config.store_url), RayActors(config), cluster())
        self._watcher = asyncio.get_running_loop().create_task(self._pool.watch())

    def check_health(self) -> None:
        """Serve restarts a pool that has stopped looking."""
        if self._watcher.done():
            self._watcher.result()

    async def start(self, tenant: str, session_id: str, turn_id: str, keys: Keys) -> Member | None:
        return await self._pool.start(tenant, session_id, turn_id, keys)

    async def find(self, tenant: str, session_id: str, lost: str | None) -> Member:
        return await self._pool.find(tenant, session_id, lost)

    async def known(self, session_id: str) -> Member | None:
        return await self._pool.known(session_id)
