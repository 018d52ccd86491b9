"""More requests than a gateway answers at once are refused at once."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve_apps.middleware import Admit
from tests.api.conftest import HERE, URL

MOST = 3


@pytest.fixture
def held() -> asyncio.Event:
    """Until it is set, no request is answered."""
    return asyncio.Event()


@pytest.fixture
def small_app(held: asyncio.Event) -> FastAPI:
    app = FastAPI()

    @app.get("/slow")
    async def slow() -> str:
        await held.wait()
        return "done"

    @app.get("/health")
    async def health() -> str:
        return "well"

    @app.get("/broken")
    async def broken() -> str:
        raise RuntimeError

    app.add_middleware(Admit, most=MOST)
    return app


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=HERE)
    return httpx.AsyncClient(transport=transport, base_url=URL)


async def until_ongoing(app: FastAPI, count: int) -> None:
    """Until so many requests are being answered."""
    admit = app.middleware_stack.app  # type: ignore[union-attr]
    while admit.ongoing < count:  # noqa: ASYNC110  # it has no event to wait for
        await asyncio.sleep(0)


async def test_one_more_is_refused_at_once_and_health_is_not(small_app: FastAPI, held: asyncio.Event) -> None:
    async with client(small_app) as http:
        slow = [asyncio.create_task(http.get("/slow")) for _ in range(MOST)]
        await http.get("/health")
        async with asyncio.timeout(10):
            await until_ongoing(small_app, MOST)
            refused = await http.get("/slow")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "3 requests" in refused.json()["error"]["message"]
        assert (await http.get("/health")).json() == "well"
        held.set()
        assert {reply.status_code for reply in await asyncio.gather(*slow)} == {200}
        assert (await http.get("/slow")).status_code == 200


async def test_a_request_that_fails_gives_its_place_back(small_app: FastAPI) -> None:
    async with client(small_app) as http:
        for _ in range(MOST + 1):
            assert (await http.get("/broken")).status_code == 500


async def test_a_client_that_leaves_gives_its_place_back(small_app: FastAPI, held: asyncio.Event) -> None:
    async with client(small_app) as http:
        slow = [asyncio.create_task(http.get("/slow")) for _ in range(MOST)]
        await http.get("/health")
        async with asyncio.timeout(10):
            await until_ongoing(small_app, MOST)
        for one in slow:
            one.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        held.set()
        assert (await http.get("/slow")).status_code == 200
