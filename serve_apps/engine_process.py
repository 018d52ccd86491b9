"""The processes of an engine end with the one that has started them.

An engine runs in processes of its own, which wait for requests and do not look whether anybody is left to send some.
After a replica or a job's worker that was killed, or that has ended as Ray's raylet did, they would keep the memory of
the model, on a GPU too, where its successor needs it. vLLM has each of its processes call `end_with_parent`, as its
documentation of plugins says: pyproject.toml names it in `vllm.general_plugins`.
"""

import multiprocessing
import os
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread


def end_with_parent() -> None:
    """Has this process end at once when the one that has started it ends, however that ends.

    In one that `multiprocessing` has not started, as a replica is, nothing happens.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        Thread(target=_end_after, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    wait([parent.sentinel])
    os._exit(1)
