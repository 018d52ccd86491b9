"""The inference API at the Llama Stack door."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.routes.common import ContextOf, answer_to, as_events, needs, stream_to, streams
from stack import embeddings, inference
from stack.api.embeddings import EmbeddingsRequest, EmbeddingsResponse
from stack.api.inference import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
)

router = APIRouter(prefix="/inference", tags=["inference"], dependencies=[needs("inference")])


@router.post(
    "/chat_completion",
    response_model=ChatCompletionResponse | ChatCompletionResponseStreamChunk,
    responses=streams(ChatCompletionResponseStreamChunk),
)
async def chat_completion(request: Request, context: ContextOf, body: ChatCompletionRequest) -> Response:
    """A model's answer to a conversation; with `stream`, as server-sent events."""
    if body.stream:
        return await stream_to(request, as_events(inference.stream_chat_completion(context, body)))
    return await answer_to(request, inference.chat_completion(context, body))


@router.post(
    "/completion",
    response_model=CompletionResponse | CompletionResponseStreamChunk,
    responses=streams(CompletionResponseStreamChunk),
)
async def completion(request: Request, context: ContextOf, body: CompletionRequest) -> Response:
    """The continuation of a text; with `stream`, as server-sent events."""
    if body.stream:
        return await stream_to(request, as_events(inference.stream_completion(context, body)))
    return await answer_to(request, inference.completion(context, body))


@router.post("/embeddings", response_model=EmbeddingsResponse)
async def embed(request: Request, context: ContextOf, body: EmbeddingsRequest) -> Response:
    """The vectors of texts by an embedding model."""
    return await answer_to(request, embeddings.embeddings(context, body))
