"""Whether everything is ready, and what there is."""

import html

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

from stack.config import home
from stack.keys import is_loopback

router = APIRouter(tags=["health"])
SERVICE = "llama-stack-ray"


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 when everything is ready; before that 503, with what is not."""
    waiting = await request.app.state.ready()
    about = {"service": SERVICE}
    if request.client is not None and is_loopback(request.client.host):
        about["home"] = str(home())  # by which scripts on this machine tell one stack from another
    if waiting:
        return JSONResponse({"status": "starting", "waiting_for": waiting, **about}, 503, {"retry-after": "2"})
    return JSONResponse({"status": "ready", **about})


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Every route with its description: a page that needs nothing from elsewhere."""
    rows = "".join(
        f"<tr><td>{method.upper()}<td><code>{html.escape(path)}</code><td>{html.escape(operation['description'])}"
        for path, methods in request.app.openapi()["paths"].items()
        for method, operation in methods.items()
    )
    page = "<!doctype html><meta charset=utf-8><title>Llama Stack on Ray</title><style>body{font:16px system-ui;"
    page += "margin:2rem}td{padding:.2rem 1rem .2rem 0;vertical-align:top}</style><h1>Routes</h1>"
    return HTMLResponse(f"{page}<p>With all fields: <a href=/openapi.json>/openapi.json</a><table>{rows}</table>")
