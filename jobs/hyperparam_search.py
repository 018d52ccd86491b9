"""A search for better values of a training's fields, by Ray Tune: each trial is a training of its own.

Trials run one after the other, in the resources of the job's one training, on the same examples. The trial whose last
loss is the lowest is the job's result; `trials.json` beside it tells of all.
"""

import json
from functools import partial
from typing import Any, TypeVar

from ray import tune
from ray.train import Result
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from jobs import driver
from jobs.reporter import Metrics
from jobs.trainer import Plan, trainer_of
from stack import post_training
from stack.api.post_training import HyperparamSearch, SearchAlgorithm, TrainingRequest
from stack.errors import StackError

R = TypeVar("R", bound=TrainingRequest)
NAME, TRIALS = "search", "trials.json"
TRIALS_DRAWN = 8


def search(metrics: Metrics, request: R, plan: Plan) -> tuple[Result, R]:
    """The result of the best trial, and the request with its values. Raises StackError if no trial succeeds.

    The figures of single trials stay apart: of each only its last loss is noted, by its number.
    """
    wanted = request.hyperparam_search_config
    assert wanted is not None
    metric = "validation_loss" if request.validation_dataset is not None else "loss"
    path = plan.folder / NAME
    run = partial(_trial, plan=plan, request=request)
    # What waits for the workers of a trial takes next to nothing, but Ray Tune wants it to take something.
    trainable = tune.with_resources(run, {"CPU": 0.01})
    if tune.Tuner.can_restore(str(path)):  # an attempt that was lost
        tuner = tune.Tuner.restore(str(path), trainable, resume_errored=False, restart_errored=False)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={name: _space(wanted, values) for name, values in wanted.parameters.items()},
            tune_config=_tuning(wanted, metric),
            run_config=tune.RunConfig(name=NAME, storage_path=str(plan.folder), verbose=0),
        )
    found = tuner.fit()
    trials = [found[number] for number in range(len(found))]
    told = [_told(trial, metric) for trial in trials]
    (plan.folder / TRIALS).write_text(json.dumps(told, indent=2) + "\n")
    for number, trial in enumerate(told, start=1):
        print(f"trial {number} of {len(told)}: {trial}")
        if trial[metric] is not None:
            metrics.log(number, [(f"trial_{metric}", float(trial[metric]))])
    metrics.progress(len(told), len(told), "trials", 0)
    good = [trial for trial in trials if trial.error is None and metric in (trial.metrics or {})]
    if not good:
        raise StackError(f"no trial of the search succeeded; the first ended with: {told[0]['error']}")
    best = min(good, key=lambda trial: float((trial.metrics or {})[metric]))
    assert best.config is not None
    assert best.metrics is not None
    chosen = post_training.with_values(request, best.config)
    # It is done already: what it saved last is found again, by its name.
    result = trainer_of(plan, chosen, f"trial-{best.metrics['trial_id']}", [], trial=True).fit()
    return result, chosen


def _space(wanted: HyperparamSearch, values: list[Any]) -> Any:
    return tune.grid_search(values) if wanted.algorithm == SearchAlgorithm.grid else tune.choice(values)


def _tuning(wanted: HyperparamSearch, metric: str) -> tune.TuneConfig:
    return tune.TuneConfig(
        metric=metric,
        mode="min",
        num_samples=1 if wanted.algorithm == SearchAlgorithm.grid else wanted.trials or TRIALS_DRAWN,
        max_concurrent_trials=1,
        search_alg=BasicVariantGenerator(random_state=wanted.seed or 0, max_concurrent=1),
        scheduler=AsyncHyperBandScheduler() if wanted.algorithm == SearchAlgorithm.asha else None,
    )


def _trial(values: dict[str, Any], plan: Plan, request: TrainingRequest) -> None:
    chosen = post_training.with_values(request, values)
    name = f"trial-{tune.get_context().get_trial_id()}"
    trainer_of(plan, chosen, name, [TuneReportCallback()], trial=True).fit()  # type: ignore[no-untyped-call]


def _told(trial: Any, metric: str) -> dict[str, Any]:
    measured = trial.metrics or {}
    error = driver.reason(trial.error) if trial.error is not None else None
    return {"values": trial.config, metric: measured.get(metric), "steps": measured.get("steps"), "error": error}
