"""Starts and stops the applications of added models, by Ray Serve's API for programs.

Applications that were started so are no part of a Serve config file: `serve deploy` leaves them alone.
"""

from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from stack.added_models import Application
from stack.api.models import ModelState
from stack.config import LanguageModel
from stack.errors import BadInput, StackError, Unavailable

# An application is built in a process of its own, which has to import vLLM.
BUILD_S = 300.0
MAX_REASON = 1_000
_STATES = {
    ApplicationStatus.NOT_STARTED: ModelState.starting,
    ApplicationStatus.DEPLOYING: ModelState.starting,
    ApplicationStatus.RUNNING: ModelState.running,
    ApplicationStatus.DEPLOY_FAILED: ModelState.failed,
    ApplicationStatus.UNHEALTHY: ModelState.failed,
    ApplicationStatus.DELETING: ModelState.stopping,
}


class ServeDeployer:
    """Implements stack.added_models.Deployer."""

    def applications(self) -> dict[str, Application]:
        try:
            found = serve.status().applications
        except (RayError, RayServeException) as error:
            raise Unavailable("Ray Serve does not tell the state of the models") from error
        return {name: application_of(one) for name, one in found.items() if one.status in _STATES}

    def deploy(self, model: LanguageModel, artifacts: str) -> None:
        args = {"model": model.model_dump(mode="json", exclude_unset=True), "artifacts": artifacts}
        try:
            ray.get(_deploy.remote(model.id, args), timeout=BUILD_S)
        except RayTaskError as error:
            if isinstance(error.cause, StackError):
                raise error.cause from error
            raise BadInput(f"the model {model.id!r} cannot be built: {_last_line(str(error.cause))}") from error
        except RayError as error:
            raise Unavailable(f"the model {model.id!r} could not be built: {_last_line(str(error))}") from error

    def delete(self, id: str) -> None:
        try:
            serve.delete(id, _blocking=False)
        except (RayError, RayServeException) as error:
            raise Unavailable(f"the model {id!r} could not be stopped") from error


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)
def _deploy(name: str, args: dict[str, Any]) -> None:
    """Runs in a process that ends then: it has imported vLLM."""
    from serve_apps.llm import build

    target = serve.RunTarget(build(args), name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def application_of(overview: ApplicationStatusOverview) -> Application:
    """The state of an application in Serve's own words, with the last line of why, if something is wrong."""
    deployments = overview.deployments.values()
    running = sum(count for one in deployments for state, count in one.replica_states.items() if state == "RUNNING")
    state = _STATES[overview.status]
    messages = [message for message in (overview.message, *(one.message for one in deployments)) if message.strip()]
    return Application(state, running, _last_line(messages[-1]) if messages else None)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-MAX_REASON:] if lines else "for no reason that was told"
