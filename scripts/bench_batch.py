"""How fast batches of any size are beside vLLM's own `LLM.chat`, and whether their memory grows with the rows.

    scripts/bench batch [--json FILE] [--only speed|memory] [--rows N]

speed    rows a second of /batch_inference/jobs with the model of serve_apps/local.yaml (without adapters), beside those
         of vLLM's offline `LLM.chat` (scripts/plain_vllm.py) in a process of its own, while no stack runs: the same
         rows, engine settings and sampling. Of both it is how much longer all rows take than the first 128, as many as
         a job asks about at once: so what a job takes to start, and how both get under way and come to an end, counts
         in neither. Both are warm, and answer the few rows before all. It takes ten minutes
memory   the most that the processes of a job hold together (its driver and Ray Data's workers), looked at once a
         second, for 10,000 and for 100,000 rows through the scripted engine. What is shared among processes is divided
         among them (PSS)

The exit status is 1 if a target is missed. It needs the machine for itself.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from scripts import local_stack
from scripts.bench_servers import BenchFailed, Server, command_of, local_model, prepared_home, stack
from scripts.bench_trainings import run, say
from scripts.figures import Comparison, write_comparisons, write_json
from stack.config import LanguageModel

PARTS = ("speed", "memory")
# How long a job takes to start differs by a second or two, so that all rows must take minutes. The few are as many as
# jobs ask about at once (jobs/asking.py).
ROWS, FEW, WARM, MAX_TOKENS = 1_000, 128, 8, 16
SHORT_ROWS, LONG_ROWS, SCRIPTED_TOKENS = 10_000, 100_000, 2
TOKENS_PER_SECOND = 1_000_000.0
# Targets: of the peer's rows a second, and of the memory of the shorter job.
LEAST, MOST = 0.9, 1.3
JOB_S, LOOK_S = 3_600.0, 1.0
WORDS = ("the", "of", "and", "to", "in", "is", "that", "you", "how", "why", "what", "write", "tell", "story", "code")
# What the command line of a process of a job has, or the title of one of Ray's: its driver, and Ray Data's workers.
OF_A_JOB = ("jobs.batch_inference", "ray::MapWorker", "ray::Read", "ray::_StatsActor")
COLUMNS = {"id": "text", "dialog": "dialog"}


@dataclass(frozen=True)
class Batch:
    """Rows that were answered: how many, how long that took from start to end, and, of a job, its processes' memory."""

    rows: int
    seconds: float
    peak_mb: float = 0.0


def main() -> int:
    arguments = _arguments()
    figures: list[Comparison] = []
    try:
        with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
            if arguments.only in (None, "speed"):
                figures.append(speed(Path(folder), arguments.rows))
                print(write_comparisons(figures[-1:], "LLM.chat", "a job"), end="\n\n", flush=True)
            if arguments.only in (None, "memory"):
                figures.append(memory(Path(folder)))
                print(write_comparisons(figures[-1:], f"{SHORT_ROWS:,} rows", f"{LONG_ROWS:,} rows"), flush=True)
    except (BenchFailed, local_stack.StartFailed, httpx.HTTPError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.json is not None:
        write_json(arguments.json, figures, bench="batch", rows=arguments.rows)
    return 0 if all(one.met for one in figures) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    parser.add_argument("--only", choices=PARTS, help="measure a part of it")
    parser.add_argument(
        "--rows", type=_rows, default=ROWS, metavar="N", help=f"how many are answered for speed ({ROWS})"
    )
    return parser.parse_args()


def _rows(text: str) -> int:
    if not text.isdecimal() or not 2 * FEW <= int(text) <= LONG_ROWS:
        raise argparse.ArgumentTypeError(f"must be an integer from {2 * FEW} to {LONG_ROWS}, not {text!r}")
    return int(text)


# Speed


def speed(folder: Path, rows: int) -> Comparison:
    """Rows a second of a job, beside those of `LLM.chat`, by the same reckoning."""
    model = local_model(adapters=0)
    say(f"LLM.chat: {FEW} rows, then {rows:,}")
    peer = offline(folder / "offline", model, rows)
    with stack(folder / "served", model, is_scripted=False, haproxy=False) as server:
        _, few, all_rows = (answer(server, model.id, count, MAX_TOKENS) for count in (WARM, FEW, rows))
    name = f"rows a second, from the {FEW}th to the {rows:,}th, {MAX_TOKENS} tokens an answer at most"
    return Comparison(name, "rows/s", rate(*peer), rate(few, all_rows), least=LEAST)


def rate(few: Batch, all_rows: Batch) -> float:
    """Rows a second, without what it takes until the engine has many of them and after it has them no more."""
    seconds = all_rows.seconds - few.seconds
    if seconds <= 0:
        raise BenchFailed(f"{all_rows.rows} rows took no longer than {few.rows}: take more --rows")
    return (all_rows.rows - few.rows) / seconds


def offline(folder: Path, model: LanguageModel, rows: int) -> tuple[Batch, Batch]:
    """The first few rows, and then all, by vLLM's own way in a process of its own. Raises BenchFailed."""
    home = prepared_home(folder)
    data, settings, output = folder / "rows.jsonl", folder / "settings.json", folder / "output.json"
    write_rows(data, rows)
    told = {"rows": str(data), "engine": engine_of(model), "max_tokens": MAX_TOKENS, "few": FEW}
    settings.write_text(json.dumps(told))
    environment = {
        "STACK_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(model.kv_cache_gb),
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = ["env", *(f"{name}={value}" for name, value in environment.items())]
    run("LLM.chat", [*command, sys.executable, "-m", "scripts.plain_vllm", str(settings), str(output)], folder / "log")
    found = json.loads(output.read_text())
    return Batch(FEW, float(found["few_seconds"])), Batch(rows, float(found["seconds"]))


def engine_of(model: LanguageModel) -> dict[str, Any]:
    """The arguments of vLLM's engine that the served model has, too."""
    same = dict(model=str(model.folder), dtype=model.dtype, max_model_len=model.context)
    # Prompts are read whole, as serve_apps/llm.py has it on CPU.
    return dict(enable_chunked_prefill=False) | model.engine | same


# Memory


def memory(folder: Path) -> Comparison:
    """The peak of a job of many rows, beside that of one with a tenth of them."""
    model = local_model(adapters=0)
    with stack(
        folder / "scripted", model, is_scripted=True, haproxy=False, tokens_per_second=TOKENS_PER_SECOND
    ) as server:
        short, long = (answer(server, model.id, rows, SCRIPTED_TOKENS) for rows in (SHORT_ROWS, LONG_ROWS))
    return Comparison("the most memory that a job's processes hold", "MB", short.peak_mb, long.peak_mb, most=MOST)


class Peak:
    """While it is open, it looks now and then at the processes of a job on a server: `mb` is the most they held."""

    def __init__(self, server: Server) -> None:
        self.mb = 0.0
        self._server = server
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="peak", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        """Adds up what the processes hold now."""
        held = 0.0
        for process in self._server.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                if is_of_a_job(command_of(process)):
                    held += process.memory_full_info().pss / 2**20
        self.mb = max(self.mb, held)

    def _look_on(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()


def is_of_a_job(command: str) -> bool:
    """Whether a process with this command line, or title, works on a job."""
    return any(part in command for part in OF_A_JOB)


# Jobs


def answer(server: Server, model: str, rows: int, max_tokens: int) -> Batch:
    """Has so many rows answered by a job, and waits for its end. Raises BenchFailed."""
    say(f"a job: {rows:,} rows")
    data = server.home / "data" / f"{rows}.jsonl"
    data.parent.mkdir(exist_ok=True)
    write_rows(data, rows)
    with httpx.Client(base_url=server.url, timeout=120) as client, Peak(server) as peak:
        body = request_of(f"batch-{rows}", data, model, max_tokens)
        _answered(client.post("/batch_inference/jobs", json=body))
        status = ended(client, body["job_uuid"])
    if status["metrics"]["failed"]:
        raise BenchFailed(f"{status['metrics']['failed']:.0f} of {rows} rows have failed")
    started, completed = (datetime.fromisoformat(status[name]) for name in ("started_at", "completed_at"))
    return Batch(rows, (completed - started).total_seconds(), peak.mb)


def request_of(job_uuid: str, data: Path, model: str, max_tokens: int) -> dict[str, Any]:
    """The request of a job: all rows of a file, with greedy answers."""
    return {
        "job_uuid": job_uuid,
        "kind": "chat_completion",
        "model": model,
        "dataset": {"columns": COLUMNS, "content_url": data.as_uri()},
        "sampling_params": {"strategy": "greedy", "max_tokens": max_tokens},
        "max_failed_rows": 0,
    }


def ended(client: httpx.Client, job_uuid: str) -> dict[str, Any]:
    """The status of a job that is completed, once it is. Raises BenchFailed."""
    deadline = time.monotonic() + JOB_S
    while time.monotonic() < deadline:
        status = _answered(client.get("/batch_inference/job/status", params={"job_uuid": job_uuid}))
        if status["status"] == "completed":
            return status
        if status["status"] in ("failed", "cancelled"):
            raise BenchFailed(f"the job {job_uuid!r} is {status['status']}: {status.get('error')}")
        time.sleep(LOOK_S)
    raise BenchFailed(f"the job {job_uuid!r} has not ended after {JOB_S:.0f} s")


def write_rows(file: Path, rows: int) -> None:
    """Writes questions of 10 to 40 words as dialogs, the same at every run."""
    drawing = random.Random(1)
    with file.open("w") as lines:
        for number in range(rows):
            text = " ".join(drawing.choices(WORDS, k=drawing.randint(10, 40)))
            lines.write(json.dumps({"id": str(number), "dialog": [{"role": "user", "content": text}]}) + "\n")


def _answered(reply: httpx.Response) -> dict[str, Any]:
    if reply.status_code != 200:
        raise BenchFailed(f"{reply.request.url.path} answers with {reply.status_code}: {reply.text[:500]}")
    found: dict[str, Any] = reply.json()
    return found


if __name__ == "__main__":
    sys.exit(main())
