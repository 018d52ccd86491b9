"""What shields cost, and how good the shield and the reward model are that ship.

    scripts/bench safety [--only PART …] [--json FILE]

rows      the injection shield's classifier as a deployment, asked by 64 for a row at a time, beside the same model
          called in a loop, with batches of the same size
shield    /safety/run_shields with that shield, one request after the other, beside the same model called directly, and
          beside a request that runs no shield. What a shield adds to a request is what is left of its time without
          these two: the way from the gateway to the deployment and back, and what is done with text and verdict. The
          deployment asked by its handle stands beside them, as it holds the largest part of that
together  four shields in one request with Python code, beside the slowest of them alone: the injection shield, a
          jailbreak shield (the same head as another deployment), the code scanner, and llama_guard on the scripted
          engine, whose answer takes a tenth of a second and no CPU, as that of a model on another machine would. A
          third party cannot be on this machine, since the fetcher asks public addresses alone
quality   the scores of the injection shield on both test splits, its false positives among 200 harmless texts, and how
          many of the pairs that were held out the reward model tells apart

The first three are measured on a stack of the bench's own, in turns with the model in a process of its own; both
compute with one thread. The exit status is 1 if a target is missed.
"""

import argparse
import asyncio
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from jobs import injection_scores
from jobs.injection_scores import InjectionScores
from scripts import local_stack, reward_head
from scripts.bench_servers import BenchFailed, free_port, local_model
from scripts.bench_trainings import enter_home, running_ray, say
from scripts.figures import (
    Comparison,
    Figure,
    Share,
    write_comparisons,
    write_json,
    write_shares,
    write_table,
)
from stack.config import GATEWAY, SequenceClassifier, home
from stack.serve_engine import ServeEngine

PARTS = ("rows", "shield", "together", "quality")
AT_ONCE, BATCH = 64, 32
ROWS, ALONE, TURNS = 640, 40, 3
TOGETHER = 10  # requests of each kind
START_S = 300.0
# Targets: of the peer's rows a second, what a shield adds at the median, and of the slowest shield's time.
LEAST, MOST_MS, MOST_TOGETHER = 0.9, 10.0, 1.2
ACCURACY, FALSE_POSITIVES, PAIRS = 0.92, 0.05, 0.6
HEAD = "stack/shields/injection_head"
GUARD_TOKENS_PER_SECOND = 1_000.0  # llama_guard asks for 100 tokens
CODE = "Is this right?\n\n```python\nimport os\n\n\ndef clean(folder):\n    os.system('rm -r ' + folder)\n```"
WORDS = ("the", "of", "and", "to", "in", "is", "that", "you", "how", "why", "what", "write", "tell", "story", "code")
SHIELDS = ("injection_shield", "jailbreak_shield", "code_scanner_guard", "llama_guard")
Figures = list[Comparison | Figure | Share]


def main() -> int:
    arguments = _arguments()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells each request once Ray Serve has been imported
    only = set(arguments.only)
    figures: Figures = []
    try:
        if "quality" in only:
            figures += quality()
        if only - {"quality"}:
            with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
                figures += served(Path(folder), only)
    except (BenchFailed, local_stack.StartFailed, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.json is not None:
        write_json(arguments.json, figures, bench="safety")
    return 0 if all(one.met for one in figures) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench safety", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="measure these parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


# How good they are


def quality() -> Figures:
    """Scores the injection shield and the reward model, and prints it."""
    say("scoring the injection shield and the reward model")
    scores = injection_scores.shipped()
    differences = reward_head.differences_in(home() / reward_head.PAIRS)
    shares = shares_of(scores, reward_head.held_out_accuracy(differences), len(differences))
    print(f"{scores.report()}\n\n{write_shares(shares)}\n", flush=True)
    return [*shares]


def shares_of(scores: InjectionScores, pair_accuracy: float, pairs: int) -> list[Share]:
    """The scores with their targets, which are those of S-Labs' split and of the pairs."""
    shares = []
    for name, split in scores.splits.items():
        has_target = name == "s-labs-test"
        harmless = split.rows - split.injections
        shares += [
            Share(f"{name}: told right", split.accuracy * split.rows, split.rows, ACCURACY if has_target else None),
            Share(f"{name}: injections found", split.recall * split.injections, split.injections),
            Share(
                f"{name}: harmless texts passed",
                (1 - split.false_positives) * harmless,
                harmless,
                1 - FALSE_POSITIVES if has_target else None,
            ),
        ]
    return [*shares, Share("reward model: held-out pairs told apart", pair_accuracy * pairs, pairs, PAIRS)]


# What they cost


def served(folder: Path, only: set[str]) -> Figures:
    """Measures those of the parts that need a stack, and prints them."""
    figures: Figures = []
    model = classifier("injection-classifier")
    with serving(folder) as url, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as peer:
        if "rows" in only:
            say("rows")
            rows = compare_rows(model, peer)
            figures.append(rows)
            print(write_comparisons([rows], "called directly", "deployment"), end="\n\n", flush=True)
        with httpx.Client(base_url=url, timeout=60) as client:
            if "shield" in only:
                say("a shield")
                found = added_by_shield(client, model, peer)
                figures += found
                print(write_table(found), end="\n\n", flush=True)
            if "together" in only:
                say("shields together")
                *alone, together = run_together(client)
                figures += [*alone, together]
                print(write_table(alone), end="\n\n")
                print(write_comparisons([together], "the slowest alone", "all four"), flush=True)
    return figures


def compare_rows(model: SequenceClassifier, peer: ProcessPoolExecutor) -> Comparison:
    texts = drawn(ROWS)
    direct, deployed = [], []
    for _ in range(TURNS):  # in turns, so that both have their share of what else the machine does
        direct.append(peer.submit(rate_directly, model, texts).result())
        deployed.append(asyncio.run(rate_of_deployment(model, texts)))
    peers, ours = statistics.median(direct), statistics.median(deployed)
    return Comparison(f"rows a second, {AT_ONCE} at once", "rows/s", peers, ours, least=LEAST)


def added_by_shield(client: httpx.Client, model: SequenceClassifier, peer: ProcessPoolExecutor) -> list[Figure]:
    texts = drawn(ALONE)
    direct, deployed, shield, without = list[float](), list[float](), list[float](), list[float]()
    run(client, ["injection_shield"], texts[0])
    for _ in range(TURNS):
        direct += peer.submit(times_directly, model, texts).result()
        deployed += asyncio.run(times_of_deployment(model, texts))
        shield += times_of(lambda text: run(client, ["injection_shield"], text), texts)
        without += times_of(lambda _: client.get("/safety/shields").raise_for_status(), texts)
    return figures_of_shield(direct, deployed, shield, without)


def figures_of_shield(
    direct: list[float], deployed: list[float], shield: list[float], without: list[float]
) -> list[Figure]:
    """Their medians, from milliseconds, and what the shield adds to a request and to the model's own time."""

    def p50(name: str, values: list[float]) -> Figure:
        return Figure(name, "ms", statistics.median(values))

    added = statistics.median(shield) - statistics.median(without) - statistics.median(direct)
    return [
        p50("a row, the model called directly", direct),
        p50("its deployment, asked by its handle", deployed),
        p50("/safety/run_shields with one shield", shield),
        p50("/safety/shields, which runs none", without),
        Figure("added by the shield to a request and the model's own time", "ms", added, most=MOST_MS),
    ]


def run_together(client: httpx.Client) -> list[Any]:
    """The figures of each shield alone, then their comparison with all of them."""
    kinds = [[name] for name in SHIELDS] + [list(SHIELDS)]
    taken: list[list[float]] = [[] for _ in kinds]
    for kind in kinds:
        run(client, kind, CODE)
    for _ in range(TOGETHER):
        for kind, times in zip(kinds, taken, strict=True):
            times += times_of(lambda text, kind=kind: run(client, kind, text), [CODE])  # type: ignore[misc]
    *alone, together = [statistics.median(times) for times in taken]
    figures = [Figure(f"{name} alone", "ms", one) for name, one in zip(SHIELDS, alone, strict=True)]
    return [*figures, Comparison("four shields in one request", "ms", max(alone), together, most=MOST_TOGETHER)]


def run(client: httpx.Client, names: Sequence[str], text: str) -> None:
    """Runs shields on a message. Raises BenchFailed where they do not all answer."""
    shields = [{"shield_type": name, "on_violation_action": 0} for name in names]
    reply = client.post(
        "/safety/run_shields", json={"messages": [{"role": "user", "content": text}], "shields": shields}
    )
    if reply.status_code != 200 or len(reply.json()["responses"]) != len(names):
        raise BenchFailed(f"/safety/run_shields answers with {reply.status_code}: {reply.text[:500]}")


def drawn(rows: int) -> list[str]:
    """Texts of 10 to 80 words, the same at every run."""
    drawing = random.Random(1)
    return [" ".join(drawing.choices(WORDS, k=drawing.randint(10, 80))) for _ in range(rows)]


def times_of(do: Callable[[str], object], texts: Sequence[str]) -> list[float]:
    """The milliseconds that it takes for each text, one after the other."""
    times = []
    for text in texts:
        start = time.perf_counter()
        do(text)
        times.append(1_000 * (time.perf_counter() - start))
    return times


# The model called directly, in a process of its own


def rate_directly(model: SequenceClassifier, texts: list[str]) -> float:
    """Rows a second of a loop over batches."""
    score = _directly(model)
    score(texts[:BATCH])
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        score(texts[first : first + BATCH])
    return len(texts) / (time.perf_counter() - start)


def times_directly(model: SequenceClassifier, texts: list[str]) -> list[float]:
    """The milliseconds of each text alone."""
    score = _directly(model)
    score(texts[:1])
    return times_of(lambda text: score([text]), texts)


def _directly(model: SequenceClassifier) -> Callable[[list[str]], None]:
    from serve_apps.classifiers import Classifier

    loaded = Classifier(model)

    def score(batch: list[str]) -> None:
        loaded.logits(loaded.tokenize(batch, windows=True)[0])

    return score


# Its deployment


async def rate_of_deployment(model: SequenceClassifier, texts: list[str]) -> float:
    """Rows a second, of which so many are asked for at once."""
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
    return len(texts) / (time.perf_counter() - start)


async def times_of_deployment(model: SequenceClassifier, texts: list[str]) -> list[float]:
    """The milliseconds of each text alone."""
    engine = ServeEngine()
    await engine.classify(model, texts[:1], True)
    times = []
    for text in texts:
        start = time.perf_counter()
        await engine.classify(model, [text], True)
        times.append(1_000 * (time.perf_counter() - start))
    return times


# The stack


def classifier(id: str) -> SequenceClassifier:
    """The injection shield's, as it is served here."""
    return SequenceClassifier(
        id=id, path=HEAD, max_tokens=256, max_batch=BATCH, max_ongoing_requests=AT_ONCE, max_queued_requests=1_000
    )


def document(port: int) -> dict[str, Any]:
    """The Serve config file of a stack with the four shields and what they ask."""
    guard = local_model(id="guard", adapters=0, cpus=0.1).model_dump(mode="json", exclude_unset=True)
    classifiers = [
        classifier(name).model_dump(mode="json", exclude_unset=True)
        for name in ("injection-classifier", "jailbreak-classifier")
    ]
    shields = [
        {"id": "injection_shield", "type": "injection_shield", "model": "injection-classifier"},
        {"id": "jailbreak_shield", "type": "jailbreak_shield", "model": "jailbreak-classifier"},
        {"id": "llama_guard", "type": "llama_guard", "model": "guard"},
    ]
    args = {"models": [guard], "classifiers": classifiers, "shields": shields}
    paced = {"model": guard, "tokens_per_second": GUARD_TOKENS_PER_SECOND}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            _application(GATEWAY, "serve_apps.gateway:build", args, route_prefix="/"),
            _application("guard", local_stack.SCRIPTED_IMPORT_PATH, paced),
            *(_application(one["id"], local_stack.CLASSIFIERS_IMPORT_PATH, {"model": one}) for one in classifiers),
        ],
    }


def _application(name: str, import_path: str, args: dict[str, Any], route_prefix: str | None = None) -> dict[str, Any]:
    return {"name": name, "import_path": import_path, "route_prefix": route_prefix, "args": args}


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """That stack, on a Ray of this process's own, from when it answers on. Gives its address."""
    enter_home(folder)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running_ray() as address:
        local_stack.deploy(document(port), address, lambda: False)
        local_stack.wait_until_ready(url, START_S, lambda: False, lambda _: None)
        yield url


if __name__ == "__main__":
    sys.exit(main())
