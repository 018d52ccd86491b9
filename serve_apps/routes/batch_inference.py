"""The batch inference API."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.routes.common import ContextOf, answer_to, needs
from stack import batch_inference
from stack.api.batch_inference import (
    BatchChatCompletionRequest,
    BatchChatCompletionResponse,
    BatchCompletionRequest,
    BatchCompletionResponse,
)

router = APIRouter(prefix="/batch_inference", tags=["batch inference"], dependencies=[needs("inference")])


@router.post("/chat_completion", response_model=BatchChatCompletionResponse)
async def chat_completion(request: Request, context: ContextOf, body: BatchChatCompletionRequest) -> Response:
    """A model's answers to up to 256 conversations, in their order. A row that fails is told in `errors`."""
    return await answer_to(request, batch_inference.chat_completion(context, body))


@router.post("/completion", response_model=BatchCompletionResponse)
async def completion(request: Request, context: ContextOf, body: BatchCompletionRequest) -> Response:
    """The continuations of up to 256 texts, in their order. A row that fails is told in `errors`."""
    return await answer_to(request, batch_inference.completion(context, body))
