"""What deployments of models share that read whole texts at once: their replicas, and the batches of their texts."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve

from serve_apps.placement import NOT_SPOT
from serve_apps.replica_ports import listen_inside
from stack.config import EmbeddingModel, SequenceClassifier

# A text as a model takes it: the ids of its tokens, with the special ones.
Tokens = list[int]
# What a model gives to texts: a row of numbers for each.
Rows = NDArray[np.float32]
T = TypeVar("T")

# The texts of one pass have at most so many tokens, so that what waits for it, such as the health check, waits briefly.
MAX_PASS_TOKENS = 16_384
# Texts of this length or less are padded to one length.
SHORT_TOKENS = 16


listen_inside()


def deployment_options(model: EmbeddingModel | SequenceClassifier) -> dict[str, Any]:
    """Ray Serve's options of the deployment: how many replicas, what each takes, and how many requests of each."""
    options: dict[str, Any] = dict(
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        ray_actor_options=dict(
            num_cpus=model.cpus,
            num_gpus=model.gpus,
            runtime_env=dict(env_vars={"HF_HUB_OFFLINE": "1"}),
            label_selector=NOT_SPOT,
        ),
    )
    if model.min_replicas == model.most_replicas:
        return options | dict(num_replicas=model.min_replicas)
    return options | dict(
        autoscaling_config=dict(
            min_replicas=model.min_replicas,
            max_replicas=model.most_replicas,
            target_ongoing_requests=model.target_ongoing_requests,
            upscale_delay_s=model.upscale_delay_s,
            downscale_delay_s=model.downscale_delay_s,
        )
    )


def set_threads(model: EmbeddingModel | SequenceClassifier) -> None:
    """Lets PyTorch compute with as many threads as the replica has CPUs."""
    import torch

    if not model.gpus:
        torch.set_num_threads(max(1, math.floor(model.cpus)))


class Batches:
    """Computes the rows of texts, those of several requests in one batch, by a function of a few tokenized texts.

    One thread computes and another one tokenizes, so that the event loop does neither.
    """

    def __init__(self, model: EmbeddingModel | SequenceClassifier, compute: Callable[[list[Tokens]], Rows]) -> None:
        self._compute = compute
        self._max_batch = model.max_batch
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._idle = asyncio.Event()
        self._idle.set()
        self._compute_with_others = serve.batch(
            max_batch_size=model.max_batch, batch_wait_timeout_s=model.batch_wait_s, batch_size_fn=_texts_in
        )(self._compute_batch)

    async def tokenized(self, tokenize: Callable[..., T], *args: Any) -> T:
        """What a function gives that tokenizes."""
        return await _in_thread(self._tokenizing, tokenize, *args)

    async def rows(self, texts: Sequence[Tokens]) -> Rows:
        """The rows of texts, of which there is at least one, in their order."""
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        # One chunk after the other: requests take turns, and of one that is cancelled no more is computed.
        chunks = [by_length[start : start + self._max_batch] for start in range(0, len(texts), self._max_batch)]
        parts = [await self._chunk([texts[index] for index in chunk]) for chunk in chunks]
        return _in_order(parts, by_length)

    async def rows_at_once(self, texts: list[Tokens]) -> Rows:
        """The rows of a few texts, as soon as the pass that is computed now is done."""
        return await _in_thread(self._computing, self._compute, texts)

    async def _chunk(self, chunk: list[Tokens]) -> Rows:
        # Serve hands over a batch as soon as its time is up, be the model free or not: while it computes, what comes
        # is held back here, and makes one batch afterwards.
        await self._idle.wait()
        return await self._compute_with_others(chunk)

    async def _compute_batch(self, chunks: list[list[Tokens]]) -> list[Rows]:
        self._idle.clear()
        try:
            texts = [tokens for chunk in chunks for tokens in chunk]
            order, parts = [], []
            for one_pass in passes([len(tokens) for tokens in texts]):
                order += one_pass
                parts.append(await self.rows_at_once([texts[index] for index in one_pass]))
            return np.split(_in_order(parts, order), np.cumsum([len(chunk) for chunk in chunks])[:-1])
        finally:
            self._idle.set()


def passes(lengths: list[int]) -> Iterator[list[int]]:
    """Which texts of a batch go through the model together, by their indices.

    They are sorted by their lengths in tokens, and none is padded to more than twice its own, unless it is short.
    """
    indices = sorted(range(len(lengths)), key=lengths.__getitem__)
    while indices:
        longest = 2 * max(SHORT_TOKENS, lengths[indices[0]])
        count = 1
        while (
            count < len(indices)
            and lengths[indices[count]] <= longest
            and lengths[indices[count]] * (count + 1) <= MAX_PASS_TOKENS
        ):
            count += 1
        yield indices[:count]
        indices = indices[count:]


def _in_order(parts: list[Rows], order: list[int]) -> Rows:
    """Rows that were computed in another order, in their own."""
    computed = np.concatenate(parts)
    rows = np.empty_like(computed)
    rows[order] = computed
    return rows


def _texts_in(chunks: list[list[Tokens]]) -> int:
    return sum(len(chunk) for chunk in chunks)


async def _in_thread(threads: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)
