"""Ray's own nodes are asked for their addresses."""

import warnings
from collections.abc import Iterator

import pytest
import ray

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray Serve's own use of pydantic
    from serve_apps.address import addresses_here
    from serve_apps.node_locks import addresses_of
    from serve_apps.placement import addresses_by_id

GONE = "ab" * 28


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_nodes_tell_their_addresses_and_one_that_is_gone_holds_up_none(local_ray: None) -> None:
    (node,) = addresses_by_id()
    assert addresses_of([GONE, node]) == {node: addresses_here()}
