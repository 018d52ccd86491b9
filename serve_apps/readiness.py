"""What of a stack is not ready yet, as /health tells it."""

import asyncio
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_apps.session_pool import NAME as SESSION_POOL
from stack.config import GATEWAY, Config
from stack.errors import Away
from stack.memory_banks.serve_writer import NAME as MEMORY_WRITER
from stack.serve_controller import ANSWER_S, NAME, Controller

# The deployments of the gateway's application that it needs, and what they are called where one is not there.
OTHERS = {MEMORY_WRITER: "memory writer", SESSION_POOL: "pool of sessions"}


class Readiness:
    """Asks Serve's controller and the job supervisor, both at once, for ANSWER_S: anybody may ask for /health."""

    def __init__(self, config: Config, controller: Controller, supervisor: DeploymentHandle[Any]) -> None:
        self._config = config
        self._controller = controller
        self._supervisor = supervisor

    async def __call__(self) -> dict[str, str]:
        """What is not ready, by name."""
        waiting, problem = await asyncio.gather(self._applications(), self._problem())
        if problem:
            waiting["job supervisor"] = problem
        return waiting

    async def _applications(self) -> dict[str, str]:
        try:
            applications = await self._controller.applications()
        except Away as error:
            return {NAME: error.message}
        waiting = {}
        for model in self._config.all_models:
            application = applications.get(model.id)
            if application is None or application.status != "RUNNING":
                waiting[model.id] = application.status.value if application else "NOT DEPLOYED"
        gateway = applications.get(GATEWAY)
        for deployment, name in OTHERS.items():
            other = gateway.deployments.get(deployment) if gateway is not None else None
            if other is not None and other.status != "HEALTHY":
                waiting[name] = other.status.value
        return waiting

    async def _problem(self) -> str | None:
        """Why jobs cannot be handed to Ray, if they cannot."""
        call = self._supervisor.problem.remote()
        try:
            async with asyncio.timeout(ANSWER_S):
                problem: str | None = await call
        except (RayActorError, RayServeException) as error:
            return str(error)
        except TimeoutError:
            call.cancel()  # type: ignore[no-untyped-call]
            return f"it has not answered within {ANSWER_S:g} s"
        return problem
