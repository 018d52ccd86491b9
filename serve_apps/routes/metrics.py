"""What Prometheus reads."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from serve_apps.routes.common import needs

router = APIRouter(tags=["metrics"], dependencies=[needs("admin")])


@router.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Requests, the jobs of all tenants, and the gateway's process, in Prometheus's text format."""
    return Response(request.app.state.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})
