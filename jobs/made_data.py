"""The data sets that a job has made: registered, or kept among its artifacts where they cannot be.

So what took hours is not lost because a bound is passed, a name is taken meanwhile, or we have made a mistake.
"""

import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from jobs import driver
from stack import jobs, made_datasets
from stack.api.datasets import TrainEvalDatasetColumnType
from stack.errors import StackError, TooLarge, TooManyFailed, Unavailable


@dataclass(frozen=True)
class MadeData:
    """Rows that a job has made: what they hold, the id that their data set is to have, their file and its columns."""

    what: str
    name: str
    file: Path
    columns: dict[str, TrainEvalDatasetColumnType]


@dataclass(frozen=True)
class Registered:
    """The ids of data sets by what they hold; or why there are none."""

    datasets: dict[str, str]
    problem: str | None = None


def problem_of(ask: Callable[[], None]) -> str | None:
    """Why a job's rows cannot all be asked about, if they cannot: it has failed, and what it has of them is kept.

    So it is where too many have failed, where too much is made of them, and where a worker of Ray has raised what only
    a mistake of ours raises. Raises what loses the attempt: the next one goes on with what it has.
    """
    try:
        ask()
    except (TooManyFailed, TooLarge, RayTaskError) as error:
        if driver.is_lost(error):
            raise
        if not isinstance(error, StackError):
            traceback.print_exception(error)  # nobody else tells where it was
        return driver.reason(error)
    return None


def results_folder(work: driver.Work) -> Path:
    """An empty folder for the files that a job publishes: what a lost attempt has left there is removed."""
    folder = work.folder / "results"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def register(
    work: driver.Work, made: Sequence[MadeData], lineage: dict[str, Any], results: Path, problem: str | None = None
) -> Registered:
    """Registers data sets, but those without rows.

    Where there is a problem already, or one of them cannot be registered, none is: their files are put into the folder
    of results, by what they hold. Raises Unavailable, as another attempt may go well.
    """
    if problem is None:
        driver.require_open(work)
        try:
            found = [made_datasets.register(work.context, one.name, one.file, one.columns, lineage) for one in made]
            kept = zip(made, found, strict=True)
            return Registered({one.what: dataset.uuid for one, dataset in kept if dataset is not None})
        except Unavailable:
            raise
        except StackError as error:
            problem = error.message
            made_datasets.forget(work.context, work.job)
    for one in made:
        if one.file.stat().st_size:
            one.file.replace(results / f"{one.what}.jsonl")
    return Registered({}, problem)


def outcome(
    work: driver.Work, folder: str, results: Path, registered: Registered, about: dict[str, Any]
) -> driver.Outcome:
    """Publishes the results in a folder of the artifacts, and says what the job has come to. Raises Unavailable."""
    name = jobs.artifact_name(work.job.tenant, folder, work.job.uuid)
    files = driver.publish(work, name, results)
    path, told = work.context.artifacts.url(name), [asdict(one) for one in files]
    kept = {"path": path, "files": told, "datasets": registered.datasets}
    artifact = driver.artifact_row(work, name, "dataset", files, about)
    return driver.Outcome(kept, artifact, problem=registered.problem)
