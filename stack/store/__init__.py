"""The database: the truth of what was accepted and how far it is. SQLite by default, PostgreSQL by its address.

One class of queries per concept, as the attributes of `Store`. Each method is one transaction and blocks: call it from
a thread where an event loop runs. Methods take the tenant whose rows they see; those few that see all tenants' rows,
for the job supervisor and the administrator, say so in their docstring.
"""

from stack.store.adapters import Adapter, Adapters
from stack.store.agentic_system import Agents
from stack.store.artifacts import Artifact, Artifacts
from stack.store.clusters import Clusters
from stack.store.connection import connect, now
from stack.store.datasets import Datasets
from stack.store.experiments import Experiments
from stack.store.home import Home
from stack.store.jobs import Attempt, Job, Jobs
from stack.store.keys import Keys
from stack.store.memory_banks import MemoryBank, MemoryBanks
from stack.store.migrate import migrate
from stack.store.models import AddedModel, AddedModels
from stack.store.telemetry import Telemetry
from stack.store.traces import Traces
from stack.store.turns import Turns

__all__ = ["Adapter", "AddedModel", "Artifact", "Attempt", "Job", "MemoryBank", "Store", "now"]


class Store:
    """An open database whose schema is up to date."""

    def __init__(self, url: str) -> None:
        self.engine = connect(url)
        try:
            migrate(self.engine)
        except BaseException:
            self.engine.dispose()
            raise
        self.keys = Keys(self.engine)
        self.datasets = Datasets(self.engine)
        self.home = Home(self.engine)
        self.clusters = Clusters(self.engine)
        self.jobs = Jobs(self.engine)
        self.adapters = Adapters(self.engine)
        self.models = AddedModels(self.engine)
        self.artifacts = Artifacts(self.engine)
        self.memory_banks = MemoryBanks(self.engine)
        self.agents = Agents(self.engine)
        self.turns = Turns(self.engine)
        self.experiments = Experiments(self.engine)
        self.telemetry = Telemetry(self.engine)
        self.traces = Traces(self.engine)

    def close(self) -> None:
        self.engine.dispose()
