"""What a worker of Ray Data raises, on a real Ray."""

import json
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from stack.errors import Unavailable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    import ray.data

    from jobs import driver
    from jobs.asking import Asker, asked


class Away(Asker):
    """Its model is away."""

    def __init__(self, own: None) -> None:
        pass

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        raise Unavailable("the model is away")
        yield batch


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
