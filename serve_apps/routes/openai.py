"""The OpenAI door, under /v1: answers pass through as the engine gave them."""

import datetime as dt
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.routes.common import ContextOf, event_stream, needs
from stack import embeddings
from stack.api.embeddings import OpenAIEmbeddingsRequest, OpenAIEmbeddingsResponse
from stack.api.openai import (
    OpenAIChatCompletionRequest,
    OpenAICompletionRequest,
    OpenAIModel,
    OpenAIModelList,
)
from stack.config import EmbeddingModel
from stack.context import Context
from stack.models import Endpoint, Model

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[needs("inference")])
STARTED = int(time.time())


@router.post("/chat/completions")
async def chat_completions(request: Request, context: ContextOf, body: OpenAIChatCompletionRequest) -> Response:
    """A model's answer to a conversation."""
    return await _pass_on(request, context, "chat", body.model_dump(exclude_unset=True))


@router.post("/completions")
async def completions(request: Request, context: ContextOf, body: OpenAICompletionRequest) -> Response:
    """The continuation of a text."""
    return await _pass_on(request, context, "completions", body.model_dump(exclude_unset=True))


@router.post("/embeddings", response_model=OpenAIEmbeddingsResponse)
async def embed(context: ContextOf, body: OpenAIEmbeddingsRequest) -> Response:
    """The vectors of texts by an embedding model."""
    return Response(await embeddings.openai_embeddings(context, body), media_type="application/json")


@router.get("/models")
def list_models(context: ContextOf) -> OpenAIModelList:
    """The models that can be asked: those of the config, adapters, newest first, and embedding models."""
    return OpenAIModelList(data=[_model(model) for model in context.models.all()])


@router.get("/models/{model:path}")
def get_model(context: ContextOf, model: str) -> OpenAIModel:
    """One model."""
    return _model(context.models.get_any(model))


async def _pass_on(request: Request, context: Context, endpoint: Endpoint, body: dict[str, Any]) -> Response:
    if body.get("stream"):
        return event_stream(request, await context.models.stream(endpoint, body))
    return Response(await context.models.answer(endpoint, body), media_type="application/json")


def _model(model: Model | EmbeddingModel) -> OpenAIModel:
    if isinstance(model, EmbeddingModel):
        return OpenAIModel(id=model.id, created=STARTED, root=model.id)
    created = int(dt.datetime.fromisoformat(model.created_at).timestamp()) if model.created_at else STARTED
    return OpenAIModel(id=model.id, created=created, root=model.base.id)
