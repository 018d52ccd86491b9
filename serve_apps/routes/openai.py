"""The OpenAI door, under /v1: answers pass through as the engine gave them."""

import datetime as dt
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.routes.common import ContextOf, answer_to, needs, stream_to, streams
from stack import embeddings, openai_chats, safety
from stack.api.embeddings import OpenAIEmbeddingsRequest, OpenAIEmbeddingsResponse
from stack.api.openai import (
    OpenAIChatCompletion,
    OpenAIChatCompletionChunk,
    OpenAIChatCompletionRequest,
    OpenAICompletion,
    OpenAICompletionRequest,
    OpenAIModel,
    OpenAIModelList,
)
from stack.config import EmbeddingModel
from stack.models import Model, Rewarding

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[needs("inference")])
STARTED = int(time.time())


@router.post(
    "/chat/completions",
    response_model=OpenAIChatCompletion | OpenAIChatCompletionChunk,
    responses=streams(OpenAIChatCompletionChunk),
)
async def chat_completions(request: Request, context: ContextOf, body: OpenAIChatCompletionRequest) -> Response:
    """A model's answer to a conversation."""
    asked = body.model_dump(exclude_unset=True)
    if body.stream:
        return await stream_to(request, openai_chats.stream(context, asked))
    return await answer_to(request, openai_chats.answer(context, asked))


@router.post("/completions", response_model=OpenAICompletion, responses=streams(OpenAICompletion))
async def completions(request: Request, context: ContextOf, body: OpenAICompletionRequest) -> Response:
    """The continuation of a text."""
    asked = body.model_dump(exclude_unset=True)
    if body.stream:
        return await stream_to(request, safety.stream(context, "completions", asked))
    return await answer_to(request, safety.answer(context, "completions", asked))


@router.post("/embeddings", response_model=OpenAIEmbeddingsResponse)
async def embed(request: Request, context: ContextOf, body: OpenAIEmbeddingsRequest) -> Response:
    """The vectors of texts by an embedding model."""
    return await answer_to(request, embeddings.openai_embeddings(context, body))


@router.get("/models")
def list_models(context: ContextOf) -> OpenAIModelList:
    """The models that can be asked: those of the config, adapters, newest first, embedding and reward models."""
    return OpenAIModelList(data=[_model(model) for model in context.models.all()])


@router.get("/models/{model:path}")
def get_model(context: ContextOf, model: str) -> OpenAIModel:
    """One model."""
    return _model(context.models.get_any(model))


def _model(model: Model | EmbeddingModel | Rewarding) -> OpenAIModel:
    if not isinstance(model, Model):
        return OpenAIModel(id=model.id, created=STARTED, root=model.id)
    created = int(dt.datetime.fromisoformat(model.created_at).timestamp()) if model.created_at else STARTED
    return OpenAIModel(id=model.id, created=created, root=model.base.id)
