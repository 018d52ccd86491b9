"""What a job's workers do, in this process: the rows of its data set are read and asked about without Ray."""

import asyncio
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.data.datasource import Datasource

from stack import jobs
from stack.config import LanguageModel
from stack.context import Context
from stack.store import Job
from tests import samples
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking, bank_source, dataset_source, driver, grown_prompts
    from jobs.dataset_source import Rows
    from jobs.reporter import Reporter


def answered(rows: list[dict[str, Any]], worker: asking.Asker, size: int = 4) -> Iterator[dict[str, Any]]:
    """The rows as a worker answers them, in batches of a few."""

    async def ask(batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [one async for one in worker(batch)]

    with asyncio.Runner() as loop:  # one for all, as a worker of Ray has
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            (found,) = loop.run(ask({name: [row[name] for row in part] for name in part[0]}))
            for index in range(len(part)):
                yield {name: values[index] for name, values in found.items()}


def rows_of(source: Datasource) -> list[dict[str, Any]]:
    (task,) = source.get_read_tasks(parallelism=1)
    return [row for block in task() for row in block.to_pylist()]


def work_here(monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine, *modules: Any) -> None:
    """Lets the drivers in these modules work in this process, on an engine."""
    really_open = Context.open

    def asked(
        read: Callable[[], list[dict[str, Any]]],
        asker: Callable[..., asking.Asker],
        *arguments: Any,
        own: LanguageModel | None = None,
    ) -> Iterator[dict[str, Any]]:
        worker = asker(*arguments, own=own)
        try:
            yield from answered(read(), worker)
        finally:
            worker._context.close()

    monkeypatch.setattr(Context, "open", lambda config, engine_=engine: really_open(config, engine_))
    monkeypatch.setattr(dataset_source, "rows", lambda *given, **named: rows_of(Rows(*given, **named)))
    monkeypatch.setattr(
        grown_prompts, "rows", lambda file, but: [row for row in grown_prompts._rows(file) if row["row"] not in but]
    )
    monkeypatch.setattr(bank_source, "rows", lambda file, but: rows_of(bank_source.Copied(file, but)))
    monkeypatch.setattr(grown_prompts.ray, "init", lambda: None)
    for module in modules:
        monkeypatch.setattr(module, "asked", asked)


@contextmanager
def work_of(context: Context, job: Job) -> Iterator[driver.Work]:
    """What a driver works with, in the first attempt at a job."""
    if context.store.jobs.get(job.tenant, job.uuid).status == "scheduled":  # type: ignore[union-attr]
        samples.start(context.store, job.uuid, job.tenant)
    (attempt,) = context.store.jobs.attempts(job.id)
    folder = jobs.work_folder(job.tenant, job.uuid)
    folder.mkdir(parents=True, exist_ok=True)
    yield driver.Work(context, job, Reporter(context.store, job, attempt, lost=lambda _: None), folder)


def config_of(context: Context) -> dict[str, Any]:
    return context.config.model_dump(mode="json")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
