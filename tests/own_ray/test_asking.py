"""What a worker of Ray Data raises, on a real Ray."""

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

import pytest
import ray
from ray.exceptions import RayTaskError

from stack.errors import Unavailable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    import ray.data

    from jobs import driver
    from jobs.asking import ROWS_AT_ONCE, Asker, asked


class Away(Asker):
    """Its model is away."""

    def __init__(self, own: None) -> None:
        pass

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        raise Unavailable("the model is away")
        yield batch


class GoesAway(Asker):
    """Its model answers 100 rows, and nothing after them."""

    harmless: ClassVar[dict[str, Any]] = {"text": "Hello"}

    def __init__(self, own: None) -> None:
        self._slots = asyncio.Semaphore(ROWS_AT_ONCE)
        self._turn = asyncio.Lock()
        self._gone = None
        self._answers = 0

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        if self._answers == 100:
            raise Unavailable("the model is away")
        self._answers += 1
        return {"result": json.dumps(value)}


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Data's own settings
def test_a_model_that_stays_away_loses_the_attempt_and_does_not_fail_the_job(local_ray: None) -> None:
    rows = [{"row": 1, "value": json.dumps({"text": "Hello"})}]
    with pytest.raises(RayTaskError, match="the model is away") as raised:
        list(asked(lambda: ray.data.from_items(rows), Away))
    assert driver.is_lost(raised.value)
    assert driver.reason(raised.value) == "the model is away"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Data's own settings
def test_what_was_answered_before_a_model_stays_away_arrives(local_ray: None) -> None:
    rows = [{"row": number, "value": json.dumps({"text": "Hello"})} for number in range(1, 1_001)]
    found = list(asked(lambda: ray.data.from_items(rows, override_num_blocks=1), GoesAway))
    assert sorted(one["row"] for one in found) == [*range(1, 1_001)]
    assert sum(bool(one["result"]) for one in found) == 100
    assert {one["away"] for one in found if not one["result"]} == {"the model is away"}
