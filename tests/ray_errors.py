"""Errors as Ray wraps them."""

from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError


def as_it_is(error: Exception) -> Exception:
    return error


def in_a_ray_task(error: Exception) -> Exception:
    """As Ray raises what was raised in a task or an actor."""
    return RayTaskError("work", "Traceback", error).make_dual_exception_instance()  # type: ignore[no-untyped-call]


def in_a_training_worker(error: Exception) -> Exception:
    """As Ray Train raises it."""
    return WorkerGroupError("worker 1 failed", {1: error})
