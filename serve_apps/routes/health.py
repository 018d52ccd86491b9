"""Whether everything is ready."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

router = APIRouter(tags=["health"])


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 when everything is ready; before that 503, with what is not."""
    waiting = await request.app.state.ready()
    if waiting:
        return JSONResponse({"status": "starting", "waiting_for": waiting}, 503, {"retry-after": "2"})
    return JSONResponse({"status": "ready"})
