"""How fast answers come, beside vLLM's own server and ray.serve.llm's, and what they cost.

Starts what it compares one after the other, each on a Ray of its own, and puts the same load on it:

scripted   the stack and ray.serve.llm's OpenAI ingress, on an engine that costs next to nothing and gives each of 1, 8,
           64 and 256 streams 50 tokens a second: what is measured is the way from there to the client
real       the stack and vLLM's server, with the model of serve_apps/local.yaml but without adapters: 8 streams of 64
           tokens
idle       1,000 connections that keep still, on the stack: what they take, and whether they slow 8 streams

The exit status is 1 if a target is missed. It needs a C compiler, and the machine for itself.
"""

import argparse
import asyncio
import logging
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench_servers import (
    ENGINE,
    INGRESS,
    MODEL,
    OTHER,
    PROXY,
    BenchFailed,
    Server,
    local_model,
    ray_serve_llm,
    spent,
    stack,
    vllm,
)
from scripts.figures import Comparison, Figure, write_comparisons, write_json, write_table
from scripts.load_generator import Found, LoadGenerator, NoLoad
from stack.config import LanguageModel

STREAMS, TOKENS = (1, 8, 64, 256), 128
REAL_STREAMS, REAL_TOKENS = 8, 64
CONNECTIONS, IDLE_STREAMS = 1_000, 8
PARTS = (PROXY, INGRESS, MODEL, OTHER)
WARM_TOKENS, WARM_CONNECTIONS = 8, 20
NOISE = 0.03  # by which two measurements of the same server differ
REAL_SPEED = 0.95  # of vLLM's own server
# Of ray.serve.llm: of its CPU from so many streams on, and of its tokens/s where more is asked for than it can give.
MANY, MANY_CPU = 64, 2 / 3
TOO_MANY, TOO_MANY_SPEED = 256, 1.5
CONNECTION_KB, SLOWER = 100.0, 0.1


@dataclass(frozen=True)
class Load:
    """So many streams, each of so many requests one after the other, each for so many tokens."""

    streams: int
    requests: int
    tokens: int

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "messages": [{"role": "user", "content": "Write a long story about a river."}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Measured:
    """What a load found at a server.

    A gap is the time between two arrivals of text, which may be of several tokens. The CPU seconds are of the server
    without its engine; `parts` tells whose they are, and has the engine's beside them. All times are in milliseconds.
    """

    server: str
    load: Load
    tokens_per_second: float
    requests_per_second: float
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    cpu_per_1000_tokens: float
    parts_per_1000_tokens: dict[str, float]
    peak_mb: float
    generator_cpu_per_1000_tokens: float


def main() -> int:
    arguments = _arguments()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells each request once Ray Serve has been imported
    bench = Bench(arguments.requests, haproxy=arguments.proxy == "haproxy")
    try:
        with LoadGenerator.compiled() as generator, tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
            bench.run(generator, Path(folder), arguments.only)
    except (BenchFailed, NoLoad) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(bench.table())
    if arguments.json is not None:
        measured = [asdict(one) for one in bench.measured]
        write_json(arguments.json, bench.all_figures(), bench="inference", proxy=arguments.proxy, measured=measured)
    return 0 if all(one.met for one in bench.all_figures()) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench inference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["scripted", "real", "idle"], help="measure a part of it")
    parser.add_argument(
        "--requests", type=_positive, default=8, metavar="N", help="how many requests each stream sends (8)"
    )
    parser.add_argument(
        "--proxy", choices=["haproxy", "python"], default="haproxy", help="Ray Serve's proxy, of both (haproxy)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 1000, not {text!r}")
    return int(text)


class Bench:
    """Runs the parts and collects their figures."""

    def __init__(self, requests: int, haproxy: bool) -> None:
        self._requests = requests
        self._haproxy = haproxy
        self.measured: list[Measured] = []
        self._sections: list[tuple[str, str, str, list[Comparison]]] = []
        self._figures: list[Figure] = []

    def run(self, generator: LoadGenerator, folder: Path, only: str | None) -> None:
        if only in (None, "scripted"):
            self._scripted(generator, folder)
        if only in (None, "real"):
            self._real(generator, folder)
        if only in (None, "idle"):
            self._idle(generator, folder)

    def all_figures(self) -> list[Comparison | Figure]:
        return [*(one for _, _, _, comparisons in self._sections for one in comparisons), *self._figures]

    def table(self) -> str:
        parts = [f"{title}\n\n{write_comparisons(rows, peer, ours)}" for title, peer, ours, rows in self._sections]
        if self.measured:
            parts.append(f"CPU seconds per 1,000 tokens, by part\n\n{write_parts(self.measured)}")
        if self._figures:
            parts.append(write_table(self._figures))
        return "\n\n".join(parts)

    def _scripted(self, generator: LoadGenerator, folder: Path) -> None:
        model = scripted_model()
        loads = [Load(streams, self._requests, TOKENS) for streams in STREAMS]
        say("the scripted engine alone")
        costs = [scripted_engine_cost(load) for load in loads]
        say("starting ray.serve.llm")
        with ray_serve_llm(folder / "ray.serve.llm", model, haproxy=self._haproxy) as server:
            peers = [measure(generator, server, model.id, *each) for each in zip(loads, costs, strict=True)]
        say("starting the stack")
        with stack(folder / "scripted", model, is_scripted=True, haproxy=self._haproxy) as server:
            ours = [measure(generator, server, model.id, *each) for each in zip(loads, costs, strict=True)]
        rows = [row for pair in zip(peers, ours, strict=True) for row in against_ray_serve_llm(*pair)]
        title = f"Scripted engine, {TOKENS} tokens an answer, 50 tokens/s a stream"
        self._add(title, "ray.serve.llm", "the stack", rows, [*peers, *ours])

    def _real(self, generator: LoadGenerator, folder: Path) -> None:
        # As vLLM's server is started: places for adapters cost all requests, whether one is used or not.
        model = local_model(adapters=0)
        load = Load(REAL_STREAMS, self._requests, REAL_TOKENS)
        say("starting vLLM's server")
        with vllm(folder / "vllm", model) as server:
            peer = measure(generator, server, model.id, load)
        say("starting the stack")
        with stack(folder / "real", model, is_scripted=False, haproxy=self._haproxy) as server:
            ours = measure(generator, server, model.id, load)
        title = f"{model.id}, {REAL_TOKENS} tokens an answer"
        self._add(title, "vLLM's server", "the stack", against_vllm(peer, ours), [peer, ours])

    def _idle(self, generator: LoadGenerator, folder: Path) -> None:
        model = scripted_model()
        load = Load(IDLE_STREAMS, self._requests, TOKENS)
        say("starting the stack")
        with stack(folder / "idle", model, is_scripted=True, haproxy=self._haproxy) as server:
            without = measure(generator, server, model.id, load)
            models = f"{server.url}/v1/models"
            generator.ask(models, streams=WARM_CONNECTIONS, requests=CONNECTIONS // WARM_CONNECTIONS)
            before = server.private_kb(PROXY, INGRESS)
            say(f"opening {CONNECTIONS:,} connections")
            with generator.idle(models, CONNECTIONS) as idle:
                each = (server.private_kb(PROXY, INGRESS) - before) / CONNECTIONS
                beside = measure(generator, server, model.id, load)
        self._add(f"{CONNECTIONS:,} idle connections", "without", "with", beside_idle(without, beside), [])
        self._figures.append(Figure("memory of an idle connection", "KB", each, most=CONNECTION_KB))
        self._figures.append(Figure("idle connections that the server closed", "", CONNECTIONS - idle.still_open))

    def _add(self, title: str, peer: str, ours: str, rows: list[Comparison], measured: Sequence[Measured]) -> None:
        self._sections.append((title, peer, ours, rows))
        self.measured += measured


# Measuring


def measure(
    generator: LoadGenerator, server: Server, model: str, load: Load, engine_cpu_per_1000_tokens: float = 0.0
) -> Measured:
    """Puts a load on a server. Raises BenchFailed where a request fails, or has other than the tokens asked for."""
    say(f"  {server.name}: {load.streams} streams, {load.requests} requests each")
    url = f"{server.url}/v1/chat/completions"
    generator.ask(url, Load(load.streams, 1, WARM_TOKENS).body(model), streams=load.streams)
    server.forget_peaks()
    before = server.cpu()
    found = generator.ask(url, load.body(model), streams=load.streams, requests=load.requests)
    parts = spent(before, server.cpu())
    if found.errors:
        raise BenchFailed(f"{server.name}: {len(found.errors)} of {len(found.requests)} failed: {found.errors[0]}")
    if found.tokens != load.streams * load.requests * load.tokens:
        raise BenchFailed(f"{server.name} gave {found.tokens} tokens of {load.streams * load.requests * load.tokens}")
    return measured(server.name, load, found, parts, engine_cpu_per_1000_tokens, server.peak_mb())


def measured(
    name: str, load: Load, found: Found, parts: dict[str, float], engine_cpu_per_1000_tokens: float, peak_mb: float
) -> Measured:
    """The figures of what was found, with the engine's CPU taken off the process that it runs in."""
    thousands = found.tokens / 1_000
    per_1000 = {part: parts.get(part, 0.0) / thousands for part in PARTS}
    per_1000[MODEL] = max(0.0, per_1000[MODEL] - engine_cpu_per_1000_tokens)
    engine = parts.get(ENGINE, 0.0) / thousands + engine_cpu_per_1000_tokens
    first = [1_000 * one.first_s for one in found.requests if one.first_s is not None]
    gaps = [1_000 * gap for one in found.requests for gap in one.gaps_s]
    return Measured(
        server=name,
        load=load,
        tokens_per_second=found.tokens / found.seconds,
        requests_per_second=len(found.requests) / found.seconds,
        ttft_p50=percentile(first, 50),
        ttft_p99=percentile(first, 99),
        gap_p50=percentile(gaps, 50),
        gap_p99=percentile(gaps, 99),
        cpu_per_1000_tokens=sum(per_1000.values()),
        parts_per_1000_tokens=per_1000 | {ENGINE: engine},
        peak_mb=peak_mb,
        generator_cpu_per_1000_tokens=found.cpu_seconds / thousands,
    )


def percentile(values: Sequence[float], of: float) -> float:
    """The smallest value that so many per cent of them do not exceed. Raises BenchFailed where there are none."""
    if not values:
        raise BenchFailed("no text came")
    return sorted(values)[max(0, math.ceil(of / 100 * len(values)) - 1)]


def scripted_engine_cost(load: Load) -> float:
    """The CPU seconds that the scripted engine itself takes for 1,000 tokens of a load, on the event loop of Serve."""
    import uvloop

    from serve_apps.scripted_engine import ScriptedEngine

    engine = ScriptedEngine()

    async def all_streams() -> None:
        await asyncio.gather(*(answer() for _ in range(load.streams)))

    async def answer() -> None:
        async for _ in engine.chat(load.body("model")):
            pass

    before = time.process_time()
    uvloop.run(all_streams())
    return (time.process_time() - before) / (load.streams * load.tokens / 1_000)


def scripted_model() -> LanguageModel:
    return local_model(adapters=0)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


# Comparing


def against_ray_serve_llm(peer: Measured, ours: Measured) -> list[Comparison]:
    speed = TOO_MANY_SPEED if ours.load.streams >= TOO_MANY else 1 - NOISE
    cpu = MANY_CPU if ours.load.streams >= MANY else 1 + NOISE
    return [
        *_answers(peer, ours, least=speed, most=1 + NOISE),
        _row(peer, ours, "CPU per 1,000 tokens", "s", "cpu_per_1000_tokens", most=cpu),
        _row(peer, ours, "peak memory", "MB", "peak_mb"),
    ]


def against_vllm(peer: Measured, ours: Measured) -> list[Comparison]:
    return [
        *_answers(peer, ours, least=REAL_SPEED),
        _row(peer, ours, "CPU per 1,000 tokens", "s", "cpu_per_1000_tokens"),
        _row(peer, ours, "peak memory", "MB", "peak_mb"),
    ]


def beside_idle(without: Measured, beside: Measured) -> list[Comparison]:
    return _answers(without, beside, least=1 - NOISE, most=1 + SLOWER)


def _answers(peer: Measured, ours: Measured, least: float, most: float | None = None) -> list[Comparison]:
    return [
        _row(peer, ours, "tokens a second", "", "tokens_per_second", least=least),
        _row(peer, ours, "requests a second", "", "requests_per_second", least=least),
        _row(peer, ours, "time to first token, p50", "ms", "ttft_p50", most=most),
        _row(peer, ours, "time to first token, p99", "ms", "ttft_p99", most=most),
        _row(peer, ours, "between tokens, p50", "ms", "gap_p50", most=most),
        _row(peer, ours, "between tokens, p99", "ms", "gap_p99", most=most),
    ]


def _row(peer: Measured, ours: Measured, name: str, unit: str, field: str, **target: float | None) -> Comparison:
    streams = "1 stream" if ours.load.streams == 1 else f"{ours.load.streams} streams"
    return Comparison(f"{streams}: {name}", unit, getattr(peer, field), getattr(ours, field), **target)


def write_parts(measured: Sequence[Measured]) -> str:
    """A table in Markdown of whose the CPU seconds are."""
    lines = [f"| | {' | '.join(PARTS)} | all of these | engine | load generator |"]
    lines.append(f"| --- |{' ---: |' * (len(PARTS) + 3)}")
    for one in measured:
        parts = one.parts_per_1000_tokens
        seconds = [*(parts[part] for part in PARTS), one.cpu_per_1000_tokens]
        seconds += [parts[ENGINE], one.generator_cpu_per_1000_tokens]
        lines.append(f"| {one.server}, {one.load.streams} | {' | '.join(f'{value:.3f}' for value in seconds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
