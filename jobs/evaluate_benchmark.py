"""Benchmarks: tasks of lm-eval (EleutherAI's lm-evaluation-harness), run by itself against the engine that serves.

    ray job submit -- python -m jobs.evaluate_benchmark --config FILE

The file holds the body of POST /evaluate/benchmark/. Beside lm-eval's own tasks there are those in STACK_HOME/tasks: a
YAML file each, which may name functions of a Python file beside it, or a Python file alone, with a class `Task` of
lm-eval's. Whoever may write there may run code.

lm-eval asks by its `local-completions`, which speaks OpenAI's HTTP: it does so at a door of the job's own, which keeps
the answers, so that another attempt has them at once. It tokenizes by the model's own tokenizer, and where a task
compares how likely continuations are, by the logprobs of prompts.
"""

import ast
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import ray
from transformers import AutoTokenizer

from jobs import benchmark_report, driver, engine_door
from jobs.kept_answers import KeptAnswers
from jobs.reporter import Metrics
from stack import evaluations, quotas
from stack.api.evaluations import EvaluateBenchmarkRequest
from stack.config import home
from stack.errors import BadInput
from stack.models import Model

# How many requests are with the engine at once, and how often it is noted how many were answered.
AT_ONCE = 16
NOTE_EVERY = 100
# By which methods of its models lm-eval asks.
_KINDS_OF_QUESTIONS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
# What lm-eval tells of the machine that it runs on, of itself and of each task, which is none of a tenant's business.
_OF_THE_MACHINE = ("pretty_env_info", "upper_git_hash", "git_hash")
_OF_TASKS_FILES = ("pretrained", "config_source")


def benchmark(work: driver.Work, request: EvaluateBenchmarkRequest) -> driver.Outcome:
    """Runs tasks of lm-eval on a model."""
    context, job = work.context, work.job
    model = evaluations.model_of(context, request.checkpoint)
    if not ray.is_initialized():
        ray.init()

    folders = [home() / "tasks", python_tasks(request.tasks, home() / "tasks", work.folder / "tasks")]
    progress = Progress(work.reporter.metrics)
    with KeptAnswers(work.folder / "answers", evaluations.ANSWERS_BYTES) as kept_answers:
        if len(kept_answers):
            print(f"going on from {len(kept_answers)} answers")
        with engine_door.opened(context, kept_answers, progress.noted) as door:
            found = run(door, model, request, folders, progress.asks)
        answers = len(kept_answers)
    results = work.folder / "results"
    results.mkdir(exist_ok=True)
    figures = scores(found)
    benchmark_report.write(results / "report.html", model.id, figures, found)
    _write(results, found)
    work.reporter.metrics.log(0, figures.items())
    work.reporter.metrics.progress(answers, answers, "answers", 0)
    quotas.require_room(context, sum(file.stat().st_size for file in results.iterdir()))
    name = evaluations.results_name(job.tenant, job.uuid)
    files = driver.publish(work, name, results)
    kept = {"path": context.artifacts.url(name), "files": [asdict(one) for one in files], "model": model.id}
    return driver.Outcome(kept, driver.artifact_row(work, name, "metric", files, {"model": model.id, **figures}))


class Progress:
    """Notes how far a benchmark is: how many of the questions that lm-eval has put together so far are answered.

    It puts together those of one kind, then asks them, and goes on with the next kind.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._asked = 0

    def asks(self, questions: int) -> None:
        """So many more are about to be asked."""
        self._asked += questions

    def noted(self, answers: int) -> None:
        """So many are answered, in all attempts."""
        if answers % NOTE_EVERY == 0:
            self._metrics.log(answers, [("answers", answers)])
            # Of a long text lm-eval makes several questions.
            self._metrics.progress(answers, max(answers, self._asked), "answers")


def run(
    door: engine_door.Door,
    model: Model,
    request: EvaluateBenchmarkRequest,
    folders: Sequence[Path],
    asks: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """What lm-eval finds, in its own shape: `results`, `samples` and how it was done.

    `folders` have tasks beside lm-eval's own. `asks` is told how many questions are about to be asked. Raises BadInput
    for a task that is not known, and what kept the door from an answer.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    # Some tasks shape their data by the tokenizer of the model, which they find by this name.
    tasks = _tasks(request.tasks, folders, {"pretrained": str(model.base.folder)})
    asked = LocalCompletionsAPI(
        base_url=f"{door.url}/v1/completions",
        header=door.headers,
        model=model.id,
        tokenizer=str(model.base.folder),
        tokenizer_backend="huggingface",
        max_length=model.base.context,
        add_bos_token=_begins_with_bos(model.base.folder, request.apply_chat_template),
        num_concurrent=AT_ONCE,
        # The door is as patient as one may be, and always answers.
        max_retries=1,
        timeout=0,
        seed=request.seed,
    )
    for kind in _KINDS_OF_QUESTIONS:
        setattr(asked, kind, _told(getattr(asked, kind), asks))
    try:
        found: dict[str, Any] = simple_evaluate(
            model=asked,
            tasks=list(request.tasks),
            task_manager=tasks,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            apply_chat_template=request.apply_chat_template,
            random_seed=request.seed,
            numpy_random_seed=request.seed,
            torch_random_seed=request.seed,
            fewshot_random_seed=request.seed,
        )
    except aiohttp.ClientError as error:
        if door.errors:
            raise door.errors[0] from error
        raise
    return found


def python_tasks(wanted: Sequence[str], folder: Path, made: Path) -> Path:
    """Makes a folder with what lm-eval finds those of the tasks by that are a Python file of the folder alone, with a
    class `Task`: it looks for YAML files, which say where that is. Raises BadInput for a file that is no Python."""
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name in wanted:
        file = folder / f"{name}.py"
        if file.is_file() and not (folder / f"{name}.yaml").exists() and _has_task(file):
            (made / file.name).symlink_to(file)
            (made / f"{name}.yaml").write_text(f"task: {json.dumps(name)}\nclass: !function {name}.Task\n")
    return made


def _has_task(file: Path) -> bool:
    """Whether a file has a class `Task`. It is not run: it may hold functions for another task."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise BadInput(f"the task {file.stem!r} cannot be read: {file.name} is no Python: {error}") from error
    return any(isinstance(one, ast.ClassDef) and one.name == "Task" for one in tree.body)


def _told(ask: Callable[..., Any], asks: Callable[[int], None]) -> Callable[..., Any]:
    """A method of lm-eval's models that asks a list of questions, and tells before how many these are."""

    def asking(questions: list[Any], *given: Any, **named: Any) -> Any:
        asks(len(questions))
        return ask(questions, *given, **named)

    return asking


def _tasks(wanted: list[str], folders: Sequence[Path], metadata: dict[str, Any]) -> Any:
    """lm-eval's manager of tasks, which knows those that are wanted. Raises BadInput where it cannot.

    To know its own thousands it reads all of their files, for seconds: only if not all are tasks of the folders.
    """
    from lm_eval.tasks import TaskManager

    include = [str(folder) for folder in folders if folder.is_dir()]
    own = TaskManager(include_path=include, include_defaults=False, metadata=metadata)
    if set(wanted) <= set(own.all_subtasks):
        return own
    manager = TaskManager(include_path=include, metadata=metadata)
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise BadInput(
            f"lm-eval has no task {unknown[0]!r}; allowed: one of its {len(manager.all_tasks)} tasks, or of those in "
            f"the stack's own folder {folders[0].name}: {', '.join(own.all_tasks) or 'none'}"
        )
    return manager


def _begins_with_bos(folder: Path, is_chat: bool) -> bool:
    """Whether lm-eval's own backends put the token that begins a text before a prompt: where the tokenizer does so by
    itself, unless the chat template has written it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "a"
    if is_chat:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    if tokenizer.bos_token is None or prompt.startswith(tokenizer.bos_token):
        return False
    return bool(tokenizer(prompt).input_ids[:1] == [tokenizer.bos_token_id])


def scores(found: dict[str, Any]) -> dict[str, float]:
    """The scores by `task/metric`, with their standard errors as `task/metric_stderr`.

    lm-eval names a metric with the filter that its answers went through, `none` for no filter, which is left out.
    """
    figures = {}
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if filtered and isinstance(value, int | float):
                kept = "" if filtered == "none" else f",{filtered}"
                figures[f"{task}/{metric}{kept}"] = float(value)
    return figures


def _write(folder: Path, found: dict[str, Any]) -> None:
    """lm-eval's table, its results, and a file of what was asked and answered for each task."""
    from lm_eval.utils import handle_non_serializable, make_table

    (folder / "table.md").write_text(make_table(found), encoding="utf-8")
    samples = found.pop("samples", {})
    for name in _OF_THE_MACHINE:
        found.pop(name, None)
    for config in found.get("configs", {}).values():
        for name in _OF_TASKS_FILES:
            (config.get("metadata") or {}).pop(name, None)
    told = json.dumps(found, indent=1, default=handle_non_serializable)
    (folder / "results.json").write_text(told.replace(f"{home()}/", ""))  # one's own tasks name their data
    for task, rows in samples.items():
        lines = (json.dumps(row, default=handle_non_serializable) + "\n" for row in rows)
        (folder / f"samples_{task}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(driver.run(EvaluateBenchmarkRequest, evaluations.benchmark, evaluations.resources_of_benchmark, benchmark))
