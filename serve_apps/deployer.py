"""Starts and stops the applications of added models, by Ray Serve's API for programs.

Applications that were started so are no part of a Serve config file: `serve deploy` leaves them alone.
"""

import re
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from stack.added_models import Application
from stack.api.models import ModelState
from stack.config import LanguageModel, RewardModel
from stack.errors import BadInput, StackError, Unavailable
from stack.serve_controller import Controller

# An application is built in a process of its own, which has to import vLLM.
BUILD_S = 300.0
MAX_REASON = 1_000
# How the last line of a traceback begins.
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b", re.MULTILINE)
_STATES = {
    ApplicationStatus.NOT_STARTED: ModelState.starting,
    ApplicationStatus.DEPLOYING: ModelState.starting,
    ApplicationStatus.RUNNING: ModelState.running,
    ApplicationStatus.DEPLOY_FAILED: ModelState.failed,
    ApplicationStatus.UNHEALTHY: ModelState.starting,  # it has been well, and Serve starts it again
    ApplicationStatus.DELETING: ModelState.stopping,
}


class ServeDeployer:
    """Implements stack.added_models.Deployer."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def applications(self) -> dict[str, Application]:
        found = self._controller.applications_now()
        return {name: application_of(one) for name, one in found.items() if one.status in _STATES}

    def deploy(self, model: LanguageModel | RewardModel, artifacts: str) -> None:
        args: dict[str, Any] = {"model": model.model_dump(mode="json", exclude_unset=True)}
        if isinstance(model, LanguageModel):
            args["artifacts"] = artifacts  # where its adapters are
        build = _deploy.remote(model.id, args, isinstance(model, RewardModel))
        try:
            ray.get(build, timeout=BUILD_S)
        except GetTimeoutError as error:
            ray.cancel(build, force=True)  # it would deploy what may have been removed since
            raise Unavailable(f"the model {model.id!r} was not built within {BUILD_S:g} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, StackError):
                raise error.cause from error
            raise BadInput(f"the model {model.id!r} cannot be built: {reason_in(str(error.cause))}") from error
        except RayError as error:
            raise Unavailable(f"the model {model.id!r} could not be built: {reason_in(str(error))}") from error

    def delete(self, id: str) -> None:
        try:
            serve.delete(id, _blocking=False)
        except (RayError, RayServeException) as error:
            raise Unavailable(f"the model {id!r} could not be stopped") from error


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)
def _deploy(name: str, args: dict[str, Any], is_reward: bool) -> None:
    """Runs in a process that ends then: it has imported vLLM."""
    if is_reward:
        from serve_apps.classifiers import build
    else:
        from serve_apps.llm import build

    target = serve.RunTarget(build(args), name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def application_of(overview: ApplicationStatusOverview) -> Application:
    """The state of an application in Serve's own words, with the error for which it does not run, if there is one."""
    deployments = overview.deployments.values()
    running = sum(count for one in deployments for state, count in one.replica_states.items() if state == "RUNNING")
    state = _STATES[overview.status]
    if state not in (ModelState.starting, ModelState.failed):
        return Application(state, running)  # of what is well, Serve says how it scales
    messages = [message for message in (*(one.message for one in deployments), overview.message) if message.strip()]
    return Application(state, running, reason_in(messages[0]) if messages else None)


def reason_in(message: str) -> str:
    """The error at the end of a message that may hold a traceback, in one line."""
    errors = list(_ERROR.finditer(message))
    words = " ".join(message[errors[-1].start() if errors else 0 :].split())
    return words if len(words) <= MAX_REASON else words[: MAX_REASON - 1] + "…"
