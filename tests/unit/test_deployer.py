"""What Ray Serve says of an application, put into a state and a reason."""

import warnings

import pytest

from stack.added_models import Application
from stack.api.models import ModelState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray.serve.schema import (
        ApplicationStatus,
        ApplicationStatusOverview,
        DeploymentStatus,
        DeploymentStatusOverview,
        DeploymentStatusTrigger,
        ReplicaState,
    )

    from serve_apps.deployer import MAX_REASON, application_of, reason_in

FAILED = """A replica failed to start with exception. Retrying 2 more time(s). Error:
Traceback (most recent call last):
  File "server.py", line 1, in start
    await super().__init__(llm_config, **options)
ray.exceptions.RayTaskError(RuntimeError): ray::ServeReplica:extra:LLM:extra.initialize_and_get_metadata()
RuntimeError: Traceback (most recent call last):
  File "tokenizers.py", line 412, in __init__
    raise ValueError(
ValueError: Couldn't instantiate the backend tokenizer from one of: 
(1) a `tokenizers` library serialization file, 
(2) a slow tokenizer instance
"""  # noqa: W291  # as the library has it
REASON = (
    "ValueError: Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library serialization "
    "file, (2) a slow tokenizer instance"
)


def overview(
    status: ApplicationStatus, message: str = "", of_deployment: str = "", **replicas: int
) -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.UPDATING,
        status_trigger=DeploymentStatusTrigger.CONFIG_UPDATE_STARTED,
        replica_states={ReplicaState(state): count for state, count in replicas.items()},
        message=of_deployment,
    )
    return ApplicationStatusOverview(status, message, 0.0, {"LLM:extra": deployment})


@pytest.mark.parametrize(
    ("found", "application"),
    [
        (overview(ApplicationStatus.DEPLOYING, STARTING=1), Application(ModelState.starting, 0)),
        (overview(ApplicationStatus.RUNNING, RUNNING=2, STARTING=1), Application(ModelState.running, 2)),
        (
            overview(ApplicationStatus.RUNNING, of_deployment="Downscaling from 1 to 0 replicas."),
            Application(ModelState.running, 0),
        ),
        (overview(ApplicationStatus.DELETING, STOPPING=1), Application(ModelState.stopping, 0)),
        (
            overview(ApplicationStatus.DEPLOYING, of_deployment=FAILED, STARTING=1),
            Application(ModelState.starting, 0, REASON),
        ),
        (
            overview(ApplicationStatus.DEPLOY_FAILED, "Failed to update the deployments ['LLM:extra'].", FAILED),
            Application(ModelState.failed, 0, REASON),
        ),
        (overview(ApplicationStatus.UNHEALTHY, "It is ill."), Application(ModelState.starting, 0, "It is ill.")),
    ],
)  # fmt: skip
def test_an_application_has_a_state_its_running_replicas_and_a_reason_if_it_does_not_run(
    found: ApplicationStatusOverview, application: Application
) -> None:
    assert application_of(found) == application


def test_every_status_of_serve_is_a_state() -> None:
    for status in ApplicationStatus:
        assert application_of(overview(status)).state in ModelState


def test_a_reason_is_one_line_and_bounded() -> None:
    assert reason_in("no traceback\nat all") == "no traceback at all"
    assert len(reason_in("RuntimeError: " + "x " * 5_000)) == MAX_REASON
