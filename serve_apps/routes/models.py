"""/models: which models are served, and adding and removing some while the stack runs: for administrators."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from serve_apps.routes.common import ContextOf, needs
from stack import added_models
from stack.added_models import Deployer
from stack.api.models import RemoveModelRequest, ServedModel, ServedModelList
from stack.config import LanguageModel

router = APIRouter(prefix="/models", tags=["models"], dependencies=[needs("admin")])


def _deployer(request: Request) -> Deployer:
    deployer: Deployer = request.app.state.deployer
    return deployer


DeployerOf = Annotated[Deployer, Depends(_deployer)]


@router.get("/list")
def list_models(context: ContextOf, deployer: DeployerOf) -> ServedModelList:
    """All models, those of the config, the added ones and the tenant's own, with the state of their applications."""
    return ServedModelList(data=added_models.list_models(context, deployer))


@router.post("/add")
def add(context: ContextOf, deployer: DeployerOf, body: LanguageModel) -> ServedModel:
    """Adds a model, by an entry as in the config file. It is started then, and again after every restart."""
    return added_models.add(context, body, deployer)


@router.post("/remove")
def remove(context: ContextOf, deployer: DeployerOf, body: RemoveModelRequest) -> ServedModel:
    """Removes an added or a trained model. New requests for it are 404 at once, those that are under way end."""
    return added_models.remove(context, body.model_id, deployer)
