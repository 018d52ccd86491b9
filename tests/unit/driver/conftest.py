"""What the tests of drivers share: a driver that runs in this process, and what it is given."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import driver
from stack import evaluations
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.context import Context
from tests.conftest import CONFIG
from tests.driven import Work, found_nothing
from tests.samples import dataset, dialogs, evaluation, write_rows


@pytest.fixture
def run(context: Context, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs a driver as a Ray job with the given arguments and work."""
    monkeypatch.setenv("STACK_CONFIG", json.dumps(CONFIG | {"store": context.config.store}))
    ray_job = {"metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(ray_job))

    def run(*arguments: str | Path, work: Work = found_nothing) -> int:
        monkeypatch.setattr("sys.argv", ["jobs.evaluate", *map(str, arguments)])
        return driver.run(EvaluateQuestionAnsweringRequest, evaluations.question_answering, evaluations.resources, work)

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def data(home: Path) -> dict[str, Any]:
    return dataset(write_rows(home / "data" / "test.jsonl", dialogs(2)))


@pytest.fixture
def config(tmp_path: Path, data: dict[str, Any]) -> Path:
    """A file with a right request."""
    file = tmp_path / "request.yaml"
    file.write_text(yaml.safe_dump(evaluation(data)))
    return file
