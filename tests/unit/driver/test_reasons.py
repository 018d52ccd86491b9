"""Why a job failed, in one line, by whatever ended it."""

import errno
from collections.abc import Callable
from subprocess import TimeoutExpired

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from jobs import driver
from stack.errors import BadInput, Diverged, NotFound
from tests.driven import FULL_DISK
from tests.ray_errors import as_it_is, in_a_ray_task, in_a_training_worker


@pytest.mark.parametrize("wrapped", [as_it_is, in_a_ray_task, in_a_training_worker])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadInput("row 5 is not JSON: here"), "row 5 is not JSON: here"),
        (ValueError("wrong: this one"), "ValueError: wrong: this one"),
        (ValueError("wrong:\n  5\n\n"), "ValueError: wrong: 5"),
        (ValueError(), "ValueError: no message"),
        (FULL_DISK, "the disk is full: [Errno 28] No space left on device: '/data/a'"),
        (PermissionError(errno.EACCES, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
        (NotFound("there is no model 'a'"), "there is no model 'a'"),
        (TimeoutExpired("make", 5), "subprocess.TimeoutExpired: Command 'make' timed out after 5 seconds"),
    ],
    ids=["ours", "built in", "several lines", "no message", "full disk", "another OSError", "no -Error", "a package's"],
)
def test_the_reason_of_a_failure_is_the_error_in_one_line_wherever_it_was_raised(
    error: Exception, reason: str, wrapped: Callable[[Exception], Exception]
) -> None:
    assert driver.reason(wrapped(error)) == reason


@pytest.mark.parametrize(
    "message",
    ["database or disk is full", "I/O error: No space left on device (os error 28)"],
    ids=["SQLite", "safetensors"],
)
@pytest.mark.parametrize("wrapped", [as_it_is, in_a_ray_task, in_a_training_worker])
def test_a_full_disk_is_told_by_whoever_finds_it(message: str, wrapped: Callable[[Exception], Exception]) -> None:
    assert driver.reason(wrapped(RuntimeError(message))) == f"the disk is full: {message}"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 12 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["Python", "PyTorch on CPU", "PyTorch on GPU"],
)
@pytest.mark.parametrize("wrapped", [as_it_is, in_a_ray_task, in_a_training_worker])
def test_where_memory_ends_what_to_lower_is_told(error: Exception, wrapped: Callable[[Exception], Exception]) -> None:
    reason = driver.reason(wrapped(error))
    assert reason.startswith("out of memory: lower micro_batch_size, batch_size or max_length in training_config: ")
    assert str(error) in reason


def test_what_workers_raised_is_known_by_its_kind() -> None:
    diverged = in_a_training_worker(Diverged("the loss is nan at step 3: lower the learning rate"))
    other = in_a_training_worker(BadInput("the loss is nan"))
    assert isinstance(diverged, WorkerGroupError)
    assert isinstance(other, WorkerGroupError)
    assert driver.raised_in_workers(diverged, Diverged)
    assert not driver.raised_in_workers(other, Diverged)
    assert not driver.raised_in_workers(diverged, BadInput)


def test_the_reason_of_an_interrupted_job_is_the_interruption() -> None:
    assert driver.reason(KeyboardInterrupt()) == "KeyboardInterrupt: no message"


def test_the_reason_of_a_worker_that_died_is_what_ray_says_of_it() -> None:
    reason = driver.reason(WorkerGroupError("worker 1 failed", {1: ActorDiedError()}))
    assert "The actor died unexpectedly" in reason
