"""How fast trainings are, and what memory they take, beside plain TRL on the same rows (scripts/plain_trl.py).

    scripts/bench post_training [--json FILE] [--only plain|packed|workers] [--steps N] [--repeat N]

Trains a LoRA adapter of the prepared model on the prompt-injection rows: by jobs on a Ray of the bench's own, as
`ray job submit` starts them, and by a script of plain TRL while no Ray runs. Seed, batches, precision and optimizer are
the same; nothing is saved before the end. Speeds are of real tokens, not of padding, from the second step on. Three
parts:

  plain    examples as they are
  packed   short examples that share rows, beside plain TRL with as many of them a step, each padded to the longest
  workers  two workers that share the machine's cores, beside one

The memory of a training is that of its processes (of a job the driver, Ray Train's controller and the workers): the
peak of each, less what it shares with others, added up. The exit status is 1 if a target is missed.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import psutil

from scripts import local_stack
from scripts.bench_servers import BenchFailed, command_of, local_model
from scripts.bench_trainings import enter_home, prepared_data, run, running_ray, say, submission
from scripts.figures import Comparison, Figure, write_comparisons, write_json, write_table
from scripts.prompt_injection import write_splits
from stack.config import Config
from stack.context import Context

SEED, RANK, LR, BATCH_SIZE, WORKERS = 0, 16, 1e-3, 8, 2
# A short example has fewer characters than this, and only its own text: a system prompt, the same in all, would make
# their lengths more alike. In a packed row of so many tokens there are about so many of them.
SHORT_CHARACTERS, ROW_TOKENS, TEXTS_A_ROW = 120, 512, 44
# Targets, as ratios but for the last.
SPEED, PACKED_SPEED, WORKERS_SPEED, LOSS, MEMORY, START_S = 1.0, 1.5, 0.9, 0.01, 1.1, 45
LOOK_S = 3.0  # a look takes 20 ms for each GB, as the kernel counts what is shared
DRIVER, CONTROLLER, WORKER, SCRIPT = "driver", "controller", "worker", "script"
_MODULES = {"jobs.supervised_fine_tune": DRIVER, "scripts.plain_trl": SCRIPT}
# How the titles of Ray's actors begin.
_ACTORS = {"ray::TrainController": CONTROLLER, "ray::RayTrainWorker": WORKER}
PARTS = ("plain", "packed", "workers")


@dataclass(frozen=True)
class Case:
    """A training: of which rows, how many examples or packed rows a step has, for how many steps, by how many."""

    name: str
    short: bool
    batch_size: int
    steps: int
    packing: bool = False
    workers: int = 1


@dataclass(frozen=True)
class Training:
    """What was measured of one: at each step its loss, and the tokens and the seconds since some moment before.

    `peak_mb` is by process, each named by its part. `start_s` is how long a job takes from its submission until its
    first step is written down.
    """

    loss: list[float]
    tokens: list[float]
    seconds: list[float]
    peak_mb: list[tuple[str, float]] = field(default_factory=list)
    start_s: float | None = None

    def tokens_per_second(self) -> float:
        """From the end of the first step to that of the last one: the first warms up."""
        return (self.tokens[-1] - self.tokens[0]) / (self.seconds[-1] - self.seconds[0])

    def tokens_per_step(self) -> float:
        return self.tokens[-1] / len(self.tokens)

    def last_loss(self) -> float:
        return self.loss[-1]

    def memory_mb(self) -> float:
        return sum(peak for _, peak in self.peak_mb)


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
        try:
            bench = Bench(Path(folder))
            found = bench.run(cases(arguments.only, arguments.steps), arguments.repeat)
        except (BenchFailed, local_stack.StartFailed) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    sections, figures = compared(found)
    parts = [f"{one.title}\n\n{write_comparisons(one.rows, one.peer, one.ours)}" for one in sections]
    parts.append(write_table(figures))
    script = (local_stack.ROOT / "scripts" / "plain_trl.py").read_text()
    print("\n\n".join([*parts, f"Plain TRL is this script:\n\n```python\n{script}```"]))
    everything: list[Comparison | Figure] = [*(row for one in sections for row in one.rows), *figures]
    if arguments.json is not None:
        measured = {name: [asdict(run) for run in runs] for name, runs in found.items()}
        write_json(arguments.json, everything, bench="post_training", steps=arguments.steps, measured=measured)
    return 0 if all(one.met for one in everything) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench post_training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    parser.add_argument("--only", choices=PARTS, help="measure a part of it")
    parser.add_argument("--steps", type=_from(3), default=15, metavar="N", help="how many each training has (15)")
    parser.add_argument(
        "--repeat", type=_from(1), default=1, metavar="N", help="train so often, in turns; medians count (1)"
    )
    return parser.parse_args()


def _from(least: int) -> Any:
    def checked(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= 1_000:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to 1000, not {text!r}")
        return int(text)

    return checked


# What is trained


def cases(only: str | None, steps: int) -> dict[str, Case]:
    """The trainings of a part, or of all: those of plain TRL and those of ours."""
    one = Case("ours", short=False, batch_size=BATCH_SIZE, steps=steps)
    packed = Case("ours, packed", short=True, batch_size=1, steps=steps, packing=True)
    of_part = {
        "plain": [replace(one, name="plain TRL"), one],
        "packed": [replace(packed, name="plain TRL, short", batch_size=TEXTS_A_ROW, packing=False), packed],
        "workers": [one, replace(one, name="ours, two workers", workers=WORKERS)],
    }
    return {case.name: case for part in PARTS if only in (None, part) for case in of_part[part]}


def is_plain(case: Case) -> bool:
    return case.name.startswith("plain TRL")


def request_of(case: Case, job_uuid: str, data: Path) -> dict[str, Any]:
    """The request of a job. Nothing is saved but at the end, as plain TRL does not."""
    file = data / ("short.jsonl" if case.short else "dialogs.jsonl")
    columns = {"text": "text"} if case.short else {"dialog": "dialog"}
    return {
        "job_uuid": job_uuid,
        "model": local_model().id,
        "dataset": {"columns": columns, "content_url": file.as_uri()},
        "algorithm": "lora",
        "algorithm_config": {
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": False,
            "rank": RANK,
            "alpha": 2 * RANK,
        },
        "optimizer_config": {"optimizer_type": "adamw", "lr": LR, "lr_min": 0.0, "weight_decay": 0.0},
        "training_config": {
            "n_epochs": 1_000,
            "n_iters": case.steps,
            "batch_size": case.batch_size,
            "shuffle": True,
            "seed": SEED,
            "max_length": ROW_TOKENS,
            "packing": case.packing,
            "workers": case.workers,
            "checkpoint_iters": case.steps + 1,
        },
    }


def settings_of(case: Case, data: Path, folder: Path) -> dict[str, Any]:
    """The same for plain TRL."""
    file = data / ("short.jsonl" if case.short else "completions.jsonl")
    of_case = dict(batch_size=case.batch_size, steps=case.steps, lr=LR, seed=SEED)
    return {"rows": str(file), "model": str(local_model().folder), "folder": str(folder), **of_case}


def write_rows(dialogs: Path, data: Path) -> None:
    """Writes the rows in the shapes that both take: dialogs, the same as prompts with their completions, and texts."""
    rows = [json.loads(line)["dialog"] for line in dialogs.read_text().splitlines()]
    texts = [message["content"] for row in rows for message in row if message["role"] == "user"]
    shapes: dict[str, list[dict[str, Any]]] = {
        "dialogs": [{"dialog": row} for row in rows],
        "completions": [{"prompt": row[:-1], "completion": row[-1:]} for row in rows],
        "short": [{"text": text} for text in texts if len(text) < SHORT_CHARACTERS],
    }
    data.mkdir(parents=True, exist_ok=True)
    for name, of_shape in shapes.items():
        (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in of_shape))


# Running it


class Bench:
    """Runs trainings, in a home folder of its own with the models that are prepared already."""

    def __init__(self, folder: Path) -> None:
        source = prepared_data("prompt-injection")
        self._folder = folder
        self._data = enter_home(folder) / "data"
        write_splits(source, folder / "splits")
        write_rows(folder / "splits" / "train.jsonl", self._data)
        self._runs = 0

    def run(self, all_cases: dict[str, Case], times: int) -> dict[str, list[Training]]:
        """Each of the cases so many times, in turns, by its name: those of plain TRL while no Ray runs."""
        found: dict[str, list[Training]] = {name: [] for name in all_cases}
        plain = [case for case in all_cases.values() if is_plain(case)]
        ours = [case for case in all_cases.values() if not is_plain(case)]
        for _ in range(times):
            for case in plain:
                found[case.name].append(self._plain(case))
            with running_ray() as address:
                for case in ours:
                    found[case.name].append(self._ours(case, address))
        return found

    def _plain(self, case: Case) -> Training:
        folder = self._begin(case)
        settings, output = folder / "settings.json", folder / "steps.json"
        settings.write_text(json.dumps(settings_of(case, self._data, folder / "trainer")))
        peak = finish(case, [sys.executable, "-m", "scripts.plain_trl", str(settings), str(output)], folder)
        return Training(**json.loads(output.read_text()), peak_mb=peak)

    def _ours(self, case: Case, address: str) -> Training:
        folder = self._begin(case)
        job_uuid = folder.name
        request = folder / "request.json"
        request.write_text(json.dumps(request_of(case, job_uuid, self._data)))
        submitted = time.time()
        peak = finish(case, submission(address, "jobs.supervised_fine_tune", request), folder)
        with closing(Context.open(Config.from_environment())) as context:
            return replace(training_of(context, job_uuid, submitted), peak_mb=peak)

    def _begin(self, case: Case) -> Path:
        self._runs += 1
        say(f"{case.name}: {case.steps} steps")
        folder = self._folder / f"run-{self._runs}"
        folder.mkdir()
        return folder


def finish(case: Case, command: list[str], folder: Path) -> list[tuple[str, float]]:
    """Runs a training's command to its end. Returns the peak of each of its processes. Raises BenchFailed."""
    with Peaks() as peaks:
        run(case.name, command, folder / "output.log")
    return peaks.by_process()


def training_of(context: Context, job_uuid: str, submitted: float) -> Training:
    """What the store has of a job's training, which was submitted at this time. Raises BenchFailed without steps."""
    job = context.store.jobs.get(context.tenant, job_uuid)
    points = context.store.telemetry.metrics(context.tenant, job.run_id) if job is not None else []
    found: dict[str, dict[int, float]] = {"loss": {}, "tokens": {}, "seconds": {}}
    for point in points:
        if point.name in found:  # of a step the first: when it ends, a training tells of its last one again
            found[point.name].setdefault(point.step, float(point.value))
    steps = sorted(found["loss"])
    if not steps or any(step not in of_name for of_name in found.values() for step in steps):
        raise BenchFailed(f"the job {job_uuid!r} has not recorded its loss, tokens and seconds at each step")
    values = {name: [of_name[step] for step in steps] for name, of_name in found.items()}
    first = next(point.timestamp for point in points if point.name == "loss")
    start_s = datetime.fromisoformat(first).timestamp() - submitted
    return Training(values["loss"], values["tokens"], values["seconds"], start_s=start_s)


# Memory


class Peaks:
    """While it is open, it looks now and then at the processes of a training among those that this one started."""

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, float], tuple[str, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="peaks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def by_process(self) -> list[tuple[str, float]]:
        """The part in the training, and the peak in MB, of each process that was seen."""
        return sorted(self._peaks.values())

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):  # it has just ended
                if part := part_of(process):
                    self._peaks[process.pid, process.create_time()] = (part, _peak_mb(process))

    def _look_on(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()


def part_of(process: psutil.Process) -> str | None:
    """The part of a process in a training, by what it runs or, of Ray's actors, by its title; None if it has none."""
    arguments = process.cmdline()
    if len(arguments) > 2 and arguments[1] == "-m":
        return _MODULES.get(arguments[2])
    title = command_of(process)
    return next((part for start, part in _ACTORS.items() if title.startswith(start)), None)


def _peak_mb(process: psutil.Process) -> float:
    """The most memory that a process has had, as the kernel keeps it, but its share of what it shares with others."""
    now = process.memory_full_info()
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kb = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None)
    if peak_kb is None:  # it has ended, and only waits to be asked how
        raise psutil.NoSuchProcess(process.pid)
    return (peak_kb * 1_024 - (now.rss - now.pss)) / 2**20


# Comparing


@dataclass(frozen=True)
class Section:
    title: str
    peer: str
    ours: str
    rows: list[Comparison]


def compared(found: dict[str, list[Training]]) -> tuple[list[Section], list[Figure]]:
    """What was found beside the targets, as far as it was measured."""
    sections = []
    pairs = [
        (f"Not packed, {BATCH_SIZE} examples a step", "plain TRL", "ours", against_plain),
        (f"Short texts, {TEXTS_A_ROW} a step, or a packed row", "plain TRL, short", "ours, packed", against_padded),
        ("The same batches, by two workers", "ours", "ours, two workers", against_one_worker),
    ]
    for title, peer, ours, comparison in pairs:
        if peer in found and ours in found:
            sections.append(Section(title, peer, ours, comparison(found[peer], found[ours])))
    runs = [(name, run) for name, of_name in found.items() for run in of_name]
    starts = [run.start_s for _, run in runs if run.start_s is not None]
    figures = [Figure("submission to the first step, slowest", "s", max(starts), most=START_S)] if starts else []
    for name, of_name in found.items():
        for part in sorted({part for part, _ in of_name[0].peak_mb}):
            peaks = [peak for run in of_name for one, peak in run.peak_mb if one == part]
            figures.append(Figure(f"{name}: peak memory of a {part}", "MB", statistics.median(peaks)))
    return sections, figures


def against_plain(peer: Sequence[Training], ours: Sequence[Training]) -> list[Comparison]:
    return [_speed(peer, ours, SPEED), _loss(peer, ours), _memory(peer, ours, MEMORY)]


def against_padded(peer: Sequence[Training], ours: Sequence[Training]) -> list[Comparison]:
    tokens = [median(runs, Training.tokens_per_step) for runs in (peer, ours)]
    same = Comparison("tokens a step", "", tokens[0], tokens[1])
    return [_speed(peer, ours, PACKED_SPEED), same, _memory(peer, ours)]


def against_one_worker(peer: Sequence[Training], ours: Sequence[Training]) -> list[Comparison]:
    return [_speed(peer, ours, WORKERS_SPEED), _loss(peer, ours), _memory(peer, ours)]


def _speed(peer: Sequence[Training], ours: Sequence[Training], least: float) -> Comparison:
    speeds = [median(runs, Training.tokens_per_second) for runs in (peer, ours)]
    return Comparison("tokens a second", "", speeds[0], speeds[1], least=least)


def _loss(peer: Sequence[Training], ours: Sequence[Training]) -> Comparison:
    losses = [median(runs, Training.last_loss) for runs in (peer, ours)]
    return Comparison("loss of the last step", "", losses[0], losses[1], least=1 - LOSS, most=1 + LOSS)


def _memory(peer: Sequence[Training], ours: Sequence[Training], most: float | None = None) -> Comparison:
    peaks = [median(runs, Training.memory_mb) for runs in (peer, ours)]
    return Comparison("peak memory", "MB", peaks[0], peaks[1], most=most)


def median(runs: Sequence[Training], of: Callable[[Training], float]) -> float:
    return statistics.median(map(of, runs))


if __name__ == "__main__":
    sys.exit(main())
