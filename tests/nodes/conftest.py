"""What the tests on a real stack share."""

from collections.abc import Iterator

import httpx
import pytest

from tests.running_stack import Stack


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as client:
        yield client
