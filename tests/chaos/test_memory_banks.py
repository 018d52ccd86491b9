"""kill -9 of what memory banks are written by: nothing that was acknowledged is lost, and nothing is seen by halves."""

import pytest

from tests.bank_clients import NAMES, Clients
from tests.running_stack import Stack

pytestmark = pytest.mark.long
WRITER = "ServeReplica:gateway:MemoryWriter"
KILLS = 5


def test_eight_clients_lose_nothing_while_the_writer_is_killed_again_and_again(stack: Stack) -> None:
    clients = Clients(stack, len(NAMES))
    with clients.running():
        for _ in range(KILLS):
            clients.go_on(80, 120)
            stack.kill_9(WRITER)
        clients.go_on(80, 120)
    clients.check()


def test_banks_survive_all_of_ray(stack: Stack) -> None:
    clients = Clients(stack, len(NAMES))
    with clients.running():
        clients.go_on(80, 120)
        stack.kill()
    stack.start()
    clients.check()
