"""A deployer whose applications are in this process' memory, and that fails on command."""

from dataclasses import replace

from stack.added_models import Application
from stack.api.models import ModelState
from stack.config import LanguageModel, RewardModel
from stack.errors import StackError, Unavailable

RUNNING = Application(ModelState.running, replicas=1)


class ScriptedDeployer:
    """Implements stack.added_models.Deployer.

    `running` are the applications: one that is deployed is starting, one that is deleted is stopping, until a test puts
    in something else. A `fault` is raised by `deploy`, and while `is_away` nothing is answered.
    """

    def __init__(self, running: dict[str, Application]) -> None:
        self.running = dict(running)
        self.deployed: list[tuple[LanguageModel | RewardModel, str]] = []
        self.deleted: list[str] = []
        self.fault: StackError | None = None
        self.is_away = False

    def applications(self) -> dict[str, Application]:
        if self.is_away:
            raise Unavailable("Ray Serve does not tell the state of the models")
        return dict(self.running)

    def deploy(self, model: LanguageModel | RewardModel, artifacts: str) -> None:
        self.deployed.append((model, artifacts))
        if self.fault is not None:
            raise self.fault
        self.running[model.id] = Application(ModelState.starting)

    def delete(self, id: str) -> None:
        self.deleted.append(id)
        if id in self.running:
            self.running[id] = replace(self.running[id], state=ModelState.stopping)
