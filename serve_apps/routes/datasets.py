"""The data set API. Routes that read files or the database run in threads."""

from typing import Annotated

from fastapi import APIRouter, Query

from serve_apps.routes.common import ContextOf, needs
from stack import datasets
from stack.api.datasets import CreateDatasetRequest, RegisteredDataset

router = APIRouter(prefix="/datasets", tags=["datasets"], dependencies=[needs("data")])


@router.post("/create", response_model_exclude_none=True)
def create(context: ContextOf, body: CreateDatasetRequest) -> RegisteredDataset:
    """Checks and registers a data set."""
    return datasets.create(context, body)


@router.get("/get", response_model_exclude_none=True)
def get(context: ContextOf, dataset_uuid: Annotated[str, Query(max_length=100)]) -> RegisteredDataset:
    """A registered data set."""
    return datasets.get(context, dataset_uuid)
