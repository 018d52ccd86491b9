"""A cluster loses a gateway, a worker, its head, is changed and drained: clients notice little, and lose nothing."""

from collections.abc import Iterator

import pytest

from tests.chaos.cluster import cluster
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.run import PREFIX, TARGET_S, Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with cluster(tmp_path_factory.mktemp("cluster"), PREFIX, workers=3) as started:
        run = Run(started, seed=1)
        run.without(10)
        yield run


@pytest.mark.parametrize("fault", FAULTS, ids=lambda one: one.name)
def test_a_fault_loses_nothing_and_is_over_within_a_minute(run: Run, fault: Fault) -> None:
    found = run.with_fault(fault)
    assert not found.failed
    assert not found.missing
    assert not found.lost
    assert found.recovered <= TARGET_S, found.recovery
    if found.planned:
        assert (found.refused, found.broken) == (0, 0), found.reasons


def test_the_jobs_that_were_under_way_are_done_once(run: Run) -> None:
    jobs = run.finish()
    assert len(jobs) == len(FAULTS)
    assert all(job.met for job in jobs), jobs
