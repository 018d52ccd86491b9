"""The safety API."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.routes.common import ContextOf, answer_to, needs
from stack import safety
from stack.api.safety import RunShieldsRequest, RunShieldsResponse, ShieldList

router = APIRouter(prefix="/safety", tags=["safety"], dependencies=[needs("inference")])


@router.post("/run_shields", response_model=RunShieldsResponse)
async def run_shields(request: Request, context: ContextOf, body: RunShieldsRequest) -> Response:
    """What each shield says of the messages. All shields run side by side."""
    return await answer_to(request, safety.run_shields(context, body))


@router.get("/shields")
def list_shields(context: ContextOf) -> ShieldList:
    """The shields that can be run: those of the config, and the built-in types."""
    return safety.list_shields(context)
