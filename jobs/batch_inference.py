"""A model's answers to all rows of a data set: Ray Data asks the model that serves.

    ray job submit -- python -m jobs.batch_inference --config jobs/examples/batch_inference.yaml

The file holds the body of POST /batch_inference/jobs. The answers and the errors become two data sets, row by row with
the row's id. A job that was lost goes on with the rows that it has no answer to.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from jobs import dataset_source, driver
from jobs.asking import Asker, Failures, asked
from jobs.row_log import RowLog, fill, write_rows
from stack import batch_inference, datasets, jobs, made_datasets
from stack.api.batch_inference import BatchInferenceJobRequest, BatchKind
from stack.api.datasets import TrainEvalDatasetColumnType as Kind
from stack.api.inference import ChatCompletionRequest, CompletionRequest
from stack.datasets import DIALOG, Checked
from stack.inference import Answer, answer_chat, answer_text, chat_body, completion_body

_ANSWER = {"id": Kind.text, "answer": Kind.text, "stop_reason": Kind.text}
_TOKENS = {"prompt_tokens": Kind.number, "completion_tokens": Kind.number}
_ERROR = {"id": Kind.text, "row": Kind.number, "code": Kind.text, "message": Kind.text}


def answer_all(work: driver.Work, request: BatchInferenceJobRequest) -> driver.Outcome:
    """Asks a model about every row of a data set, and makes data sets of the answers and of the errors."""
    context, started = work.context, time.time()
    checked = datasets.resolve(context, request.dataset)
    log = RowLog(work.folder / "rows.jsonl")
    if len(log.rows):
        print(f"going on from {len(log.rows)} of {checked.rows} rows")
    if len(log.rows) < checked.rows:
        shape = batch_inference.shape_of(request)
        rows = partial(dataset_source.rows, context, checked, shape, but=log.rows)
        failures = Failures(request.max_failed_rows, log.failed, log.first_error)
        told = (context.config.model_dump(mode="json"), context.tenant, failures, request.model_dump(mode="json"))
        fill(log, asked(rows, _ASKERS[request.kind], *told), checked.rows, work.reporter.metrics)
    return _outcome(work, request, checked, log, started)


class AnswerChats(Asker):
    """Asks for the answer to each row's dialog."""

    def __init__(self, config: dict[str, Any], tenant: str, failures: Failures, request: dict[str, Any]) -> None:
        super().__init__(config, tenant, failures)
        self._request = BatchInferenceJobRequest.model_validate(request)

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        dialog, request = DIALOG.validate_python(value["dialog"]), self._request
        chat = ChatCompletionRequest(model=request.model, messages=dialog, sampling_params=request.sampling_params)
        return _result(await answer_chat(self._context, chat_body(chat)))


class ContinueTexts(AnswerChats):
    """Asks for the continuation of each row's text."""

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        request = self._request
        text = CompletionRequest(model=request.model, content=value["text"], sampling_params=request.sampling_params)
        return _result(await answer_text(self._context, completion_body(text)))


class EmbedTexts(AnswerChats):
    """Asks for the vector of each row's text. The deployment batches them."""

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        found = await self._context.models.embed(self._request.model, [value["text"]], self._request.truncate)
        told = {"embedding": found.vectors[0].tolist(), "prompt_tokens": found.tokens}
        return {"result": json.dumps(told)}


_ASKERS: dict[BatchKind, type[Asker]] = {
    BatchKind.chat_completion: AnswerChats,
    BatchKind.completion: ContinueTexts,
    BatchKind.embeddings: EmbedTexts,
}


def _result(answer: Answer) -> dict[str, Any]:
    told = {
        "answer": answer.message.content,
        "stop_reason": answer.message.stop_reason.value,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }
    return {"result": json.dumps(told)}


def columns(request: BatchInferenceJobRequest) -> dict[str, Kind]:
    """The columns of the data set of answers."""
    if request.kind == BatchKind.embeddings:
        return {"id": Kind.text, "embedding": Kind.json, "prompt_tokens": Kind.number}
    return _ANSWER | _TOKENS


def answers(log: RowLog) -> Iterator[dict[str, Any]]:
    """The rows that have an answer, with their ids."""
    return ({"id": line["value"]["id"], **line["result"]} for line in log if line["error"] is None)


def errors(log: RowLog) -> Iterator[dict[str, Any]]:
    """The rows that have none, with their ids, their numbers, and why."""
    for line in log:
        if (error := line["error"]) is not None:
            yield {"id": line["value"]["id"], "row": line["row"], "code": error["code"], "message": error["message"]}


def _outcome(
    work: driver.Work, request: BatchInferenceJobRequest, checked: Checked, log: RowLog, started: float
) -> driver.Outcome:
    totals = _totals(log) | {"seconds": time.time() - started}
    lineage = _lineage(request, checked)
    made = {}
    for what, rows, kinds in (
        (batch_inference.ANSWERS, answers(log), columns(request)),
        (batch_inference.ERRORS, errors(log), _ERROR),
    ):
        file = work.folder / f"{what}.jsonl"
        write_rows(file, rows)
        found = made_datasets.register(work.context, batch_inference.dataset_name(request, what), file, kinds, lineage)
        if found is not None:
            made[what] = found.uuid
    work.reporter.metrics.log(0, totals.items())
    results = work.folder / "results"
    results.mkdir(exist_ok=True)
    (results / "lineage.json").write_text(json.dumps(lineage | {"datasets": made, "totals": totals}, indent=2))
    name = jobs.artifact_name(work.job.tenant, jobs.BATCHES, work.job.uuid)
    files = driver.publish(work, name, results)
    kept = {"path": work.context.artifacts.url(name), "files": [asdict(one) for one in files], "datasets": made}
    row = driver.artifact_row(work, name, "dataset", files, lineage | {"datasets": made})
    return driver.Outcome(kept, row)


def _totals(log: RowLog) -> dict[str, float]:
    sums = {"prompt_tokens": 0.0, "completion_tokens": 0.0}
    for line in log:
        if line["error"] is None:
            for name in sums:
                sums[name] += line["result"].get(name, 0)
    return sums | {"rows": float(len(log.rows)), "failed": float(log.failed)}


def _lineage(request: BatchInferenceJobRequest, checked: Checked) -> dict[str, Any]:
    return {
        "job_uuid": request.job_uuid,
        "kind": jobs.BATCH_INFERENCE,
        "model": request.model,
        "prompts_sha256": checked.sha256,
        "parameters": request.model_dump(mode="json", exclude={"dataset", "job_uuid", "model", "priority"}),
        "code_sha256": made_datasets.code_version(),
    }


if __name__ == "__main__":
    sys.exit(driver.run(BatchInferenceJobRequest, batch_inference.submit, batch_inference.resources, answer_all))
