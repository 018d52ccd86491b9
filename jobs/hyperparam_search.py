"""A search for better values of a training's fields, by Ray Tune: each trial is a training of its own.

Trials run one after the other, in the resources of the job's one training, on the same examples. Of those that were
trained to their end the one with the lowest validation loss is the job's result; `trials.json` beside it tells of all.

What has ended is written down there at once, so that an attempt that follows a lost one runs only the other trials, and
the lost one from its last checkpoint. A trial that failed by itself is not tried again.
"""

import json
import math
import os
import random
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ray import PlacementGroupID, tune
from ray.exceptions import RayTaskError
from ray.train import Checkpoint, ControllerError, Result, WorkerGroupError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.util.placement_group import PlacementGroup, remove_placement_group

from jobs import driver
from jobs.reporter import Metrics
from jobs.trainer import Plan, trainer_of
from jobs.training_worker import GROUP, MADE, total_steps
from stack import post_training
from stack.api.post_training import HyperparamSearch, SearchAlgorithm, TrainingRequest
from stack.config import Config
from stack.context import Context
from stack.errors import StackError

R = TypeVar("R", bound=TrainingRequest)
NAME, TRIALS = "search", "trials.json"
TRIALS_DRAWN = 8
# What a trial tells Ray Tune: its loss, how far it is, and by what it has failed.
METRIC, PERCENT, FAILED = "validation_loss", "percent", "failed"


def search(metrics: Metrics, request: R, plan: Plan) -> tuple[Result, R]:
    """The result of the best trial, and the request with its values.

    Raises StackError if no trial succeeds, and what a trial was lost by, which another attempt goes on from. The
    figures of single trials stay apart: of each only its last loss is noted, by its number.
    """
    wanted = request.hyperparam_search_config
    assert wanted is not None
    trials = drawn(wanted)
    ledger = Ledger(plan, metrics, trials)
    if left := [number for number, told in enumerate(ledger.told) if told is None]:
        _run(request, plan, wanted.algorithm, trials, left, ledger)
    for number, told in enumerate(ledger.told, start=1):
        if told is not None and told[METRIC] is not None:
            metrics.log(number, [(f"trial_{METRIC}", told[METRIC])])
    best = ledger.best()
    if best is None:
        first = ledger.told[0]
        assert first is not None
        raise StackError(f"no trial of the search succeeded; the first ended with: {first['error'] or 'no loss'}")
    return Result.from_path(_folder(plan, best)), post_training.with_values(request, trials[best])


def drawn(wanted: HyperparamSearch) -> list[dict[str, Any]]:
    """The values of each trial: all combinations in their order, or so many different ones, drawn by the seed."""
    count = post_training.combinations(wanted)
    numbers: list[int] = []
    if wanted.algorithm == SearchAlgorithm.grid:
        numbers = list(range(count))
    else:
        draw = random.Random(wanted.seed or 0)
        while len(numbers) < min(wanted.trials or TRIALS_DRAWN, count):
            number = draw.randrange(count)
            if number not in numbers:
                numbers.append(number)
    return [_combination(wanted.parameters, number) for number in numbers]


def _combination(parameters: dict[str, list[Any]], number: int) -> dict[str, Any]:
    """The combination of a number, of which the last parameter is the last digit."""
    chosen = {}
    for name, values in reversed(parameters.items()):
        number, digit = divmod(number, len(values))
        chosen[name] = values[digit]
    return {name: chosen[name] for name in parameters}


class Ledger(tune.Callback):
    """Writes down how each trial has ended, as it ends: in the file of all trials, the log and the job's progress.

    `told` is that by trial, None for those that have not ended or were lost. Of what trials save only that of the best
    so far is kept, and that of lost ones.
    """

    def __init__(self, plan: Plan, metrics: Metrics, trials: list[dict[str, Any]]) -> None:
        self._plan = plan
        self._metrics = metrics
        self._trials = trials
        self._file = plan.folder / TRIALS
        self.told: list[dict[str, Any] | None] = [None] * len(trials)
        if self._file.is_file():  # an attempt that was lost
            self.told = json.loads(self._file.read_text())

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune saves its callbacks for a restoration, which is not made of this."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, last = trial.config["number"], trial.last_result
        loss = last.get(METRIC, math.nan)
        told = {
            "values": self._trials[number],
            METRIC: loss if math.isfinite(loss) else None,
            "steps": last.get("steps"),
            "finished": last.get(PERCENT, 0) >= 100,
            "error": last.get(FAILED),
        }
        self.told[number] = told
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps(self.told, indent=2) + "\n")
        os.replace(written, self._file)
        print(f"trial {number + 1} of {len(self.told)}: {told}")
        self._metrics.progress(sum(told is not None for told in self.told), len(self.told), "trials")
        _free_workers(trial)
        self._remove()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"trial {trial.config['number'] + 1} of {len(self.told)} was lost")
        _free_workers(trial)
        self._remove()

    def best(self) -> int | None:
        """The number of the trial with the lowest loss, of those that were trained to their end."""
        ranked = [
            (told[METRIC], number)
            for number, told in enumerate(self.told)
            if told is not None and told["finished"] and told[METRIC] is not None
        ]
        return min(ranked)[1] if ranked else None

    def _remove(self) -> None:
        """Removes what is not needed any more. What a trial that was stopped early may write yet goes the next time."""
        best = self.best()
        for number, told in enumerate(self.told):
            if told is not None and number != best:
                shutil.rmtree(_folder(self._plan, number), ignore_errors=True)
        for folder in Path(self._plan.settings.temporary).glob("trial-*"):  # no trial is running now
            shutil.rmtree(folder, ignore_errors=True)


class TrialReports(TuneReportCallback):
    """Tells Ray Tune how far a trial is, in percent of its steps: other trials may have more steps, or fewer.

    Of the last step it tells only once there is what was made in the end: by 100 percent a trial is known as finished.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = steps

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        percent = 100 * metrics[0]["steps"] / self._steps
        if percent < 100 or (checkpoint is not None and (Path(checkpoint.path) / MADE).is_dir()):
            super().after_report(run_context, [metrics[0] | {PERCENT: percent}], checkpoint)


def _run(
    request: TrainingRequest,
    plan: Plan,
    algorithm: SearchAlgorithm,
    trials: list[dict[str, Any]],
    left: list[int],
    ledger: Ledger,
) -> None:
    """Runs the trials that are left, in their order. Raises what any was lost by, once all have ended."""
    shutil.rmtree(plan.folder / NAME, ignore_errors=True)
    run = partial(_trial, plan=plan, request=request, trials=trials)
    found = tune.Tuner(
        # What waits for the workers of a trial takes next to nothing, but Ray Tune wants it to take something.
        tune.with_resources(run, {"CPU": 0.01}),
        param_space={"number": tune.grid_search(left)},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            max_concurrent_trials=1,
            scheduler=_asha() if algorithm == SearchAlgorithm.asha else None,
        ),
        run_config=tune.RunConfig(name=NAME, storage_path=str(plan.folder), verbose=0, callbacks=[ledger]),
    ).fit()
    for error in found.errors:
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            raise error.cause
        raise error if isinstance(error, BaseException) else StackError(error)  # that it cannot save is its text


def _asha() -> AsyncHyperBandScheduler:
    """Stops trials at 10 and at 40 percent of their steps that are not among the best fourth of those before them there
    (4 is what Li et al. take). A training reports ten times, so that the first is after its first report."""
    return AsyncHyperBandScheduler(
        time_attr=PERCENT, grace_period=10, reduction_factor=4, max_t=100, stop_last_trials=False
    )


def _trial(values: dict[str, Any], plan: Plan, request: TrainingRequest, trials: list[dict[str, Any]]) -> None:
    number = values["number"]
    try:
        chosen = post_training.with_values(request, trials[number])
        with closing(Context.open(Config.parse(plan.settings.config, "config"))) as context:
            post_training.check_trial(context.of_tenant(plan.settings.tenant), chosen)
        reports = TrialReports(total_steps(chosen, plan.settings.examples))
        trainer_of(plan, chosen, _folder(plan, number).name, [reports], trial=True).fit()
    except (StackError, ControllerError, WorkerGroupError) as error:
        if driver.is_lost(error):
            raise
        # That it failed by itself is what has come of it: what is raised is tried again.
        tune.report({METRIC: math.nan, FAILED: driver.reason(error)})


def _free_workers(trial: Any) -> None:
    """Gives back what the workers of a trial were placed on, if it still has that.

    A trial that is stopped early takes the controller of its workers with it, which would have done this. What Ray
    Train has for such a case asks Ray's dashboard, and gives up for good where it does not reach it at once.
    """
    if group := trial.last_result.get(GROUP):
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _folder(plan: Plan, number: int) -> Path:
    """What a trial saves."""
    return plan.folder / f"trial-{number}"
