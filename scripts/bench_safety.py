"""What the deployment of a classifier costs beside the same model called directly.

    scripts/bench safety [--model FOLDER] [--rows N] [--json FILE]

Starts a Ray of its own with one classifier, as shields and reward models are served, and asks it for one row at a time,
64 at once. The peer is the same model in a process of its own, called in a loop with batches of the same size. Both
compute with one thread. The exit status is 1 if a target is missed.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from scripts import local_stack
from scripts.figures import Comparison, Figure, write_comparisons, write_json, write_table
from stack.config import SequenceClassifier
from stack.serve_engine import ServeEngine

AT_ONCE = 64
BATCH = 32
ALONE = 100  # rows that are asked one after the other
ROUNDS = 3
LEAST, MOST_MS = 0.9, 10.0  # targets: of the peer's rows a second, and what is added for a row alone, at the median
WORDS = ("the", "of", "and", "to", "in", "is", "that", "you", "how", "why", "what", "write", "tell", "story", "code")


def main() -> int:
    arguments = _arguments()
    model = SequenceClassifier(
        id="bench", path=str(arguments.model), max_batch=BATCH, max_ongoing_requests=AT_ONCE, max_queued_requests=1_000
    )
    texts = drawn(arguments.rows)
    direct: list[tuple[float, float]] = []
    served: list[tuple[float, float]] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as peer, deployed(model):
        for _ in range(ROUNDS):  # in turns, so that both have their share of what else the machine does
            direct.append(peer.submit(called_directly, model, texts).result())
            served.append(asyncio.run(asked(model, texts)))
    peers, ours = (statistics.median(rate for rate, _ in runs) for runs in (direct, served))
    peers_ms, ours_ms = (statistics.median(alone for _, alone in runs) for runs in (direct, served))
    comparison = Comparison(f"rows a second, {AT_ONCE} at once", "rows/s", peers, ours, least=LEAST)
    alone = Figure("added for a row alone", "ms", ours_ms - peers_ms, most=MOST_MS)
    print(write_comparisons([comparison], "called directly", "deployment"))
    print()
    print(write_table([Figure("a row alone, called directly", "ms", peers_ms), alone]))
    if arguments.json is not None:
        write_json(arguments.json, [comparison, alone], bench="safety", model=str(arguments.model))
    return 0 if comparison.met and alone.met else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench safety", description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        default=Path("stack/reward_head"),
        help="of a sequence classifier, or of a head on an embedding model (default: %(default)s)",
    )
    parser.add_argument("--rows", type=int, metavar="N", default=2_000, help="how many are scored (default: 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


def drawn(rows: int) -> list[str]:
    """Texts of 10 to 80 words, the same at every run."""
    drawing = random.Random(1)
    return [" ".join(drawing.choices(WORDS, k=drawing.randint(10, 80))) for _ in range(rows)]


def called_directly(model: SequenceClassifier, texts: list[str]) -> tuple[float, float]:
    """Rows a second of a loop over batches, and the median of the milliseconds that a row alone takes."""
    from serve_apps.classifiers import Classifier

    classifier = Classifier(model)

    def score(batch: list[str]) -> None:
        classifier.logits(classifier.tokenize(batch, windows=True)[0])

    score(texts[:BATCH])
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        score(texts[first : first + BATCH])
    rate = len(texts) / (time.perf_counter() - start)
    alone = []
    for text in texts[:ALONE]:
        start = time.perf_counter()
        score([text])
        alone.append(time.perf_counter() - start)
    return rate, 1_000 * statistics.median(alone)


async def asked(model: SequenceClassifier, texts: list[str]) -> tuple[float, float]:
    """The same of the deployment, of which several are asked for rows at once."""
    engine = ServeEngine()
    waiting = iter(texts)

    async def ask() -> None:
        for text in waiting:
            await engine.classify(model, [text], True)

    await engine.classify(model, texts[:BATCH], True)
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(ask())
    rate = len(texts) / (time.perf_counter() - start)
    alone = []
    for text in texts[:ALONE]:
        start = time.perf_counter()
        await engine.classify(model, [text], True)
        alone.append(time.perf_counter() - start)
    return rate, 1_000 * statistics.median(alone)


@contextmanager
def deployed(model: SequenceClassifier) -> Iterator[None]:
    """A Ray of this process's own that serves a classifier as its application does."""
    # Ray's workers would give way to whatever else runs, and the peer would not.
    os.environ |= {"RAY_worker_niceness": "0"}
    local_stack.wait_for_agent_port(lambda: False, lambda text: print(text, file=sys.stderr))
    local_stack.start_ray()
    import ray
    from ray import serve

    from serve_apps.classifiers import build

    try:
        entry = model.model_dump(mode="json", exclude_unset=True)
        serve.run(build({"model": entry}), name=model.id, route_prefix=None)
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
