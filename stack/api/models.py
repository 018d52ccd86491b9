"""Wire types of the administration of models."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from stack.api.wire import ModelId, Request, Wire


class ModelState(StrEnum):
    """What a model's application does. One that has scaled to zero is running: it starts when it is asked."""

    starting = "starting"
    running = "running"
    failed = "failed"
    stopping = "stopping"


class ModelSource(StrEnum):
    """Where a model comes from: the config file, an administrator, or a job of the tenant, who alone may ask it then.

    One of the config is taken out there, the others are removed here.
    """

    config = "config"
    added = "added"
    trained = "trained"


class ServedModel(Wire):
    """A model, its entry as in the config file, and how it is.

    `reason` says what is wrong, if anything is: in a state other than failed it is tried again. `replicas` is how many
    run.
    """

    id: str
    source: ModelSource
    state: ModelState
    reason: str | None = None
    replicas: Annotated[int, Field(ge=0)] = 0
    created_at: str | None = None
    model: dict[str, Any]


class ServedModelList(Wire):
    data: list[ServedModel]


class RemoveModelRequest(Request):
    model_id: ModelId
