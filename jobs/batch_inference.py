"""A model's answers to all rows of a data set: Ray Data asks the model that serves, or by an engine of the job's own.

    ray job submit -- python -m jobs.batch_inference --config jobs/examples/batch_inference.yaml

The file holds the body of POST /batch_inference/jobs. The answers and the errors become two data sets, row by row with
the row's id. A job that was lost goes on with the rows that it has no answer to.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

from jobs import dataset_source, driver, made_data
from jobs.asking import Asker, asked, patiently
from jobs.made_data import MadeData
from jobs.row_log import Bounds, RowLog, complete, text_of, write_rows
from stack import batch_inference, datasets, jobs, made_datasets
from stack.api.batch_inference import BatchInferenceJobRequest, BatchKind
from stack.api.datasets import TrainEvalDatasetColumnType as Kind
from stack.api.inference import ChatCompletionRequest, CompletionRequest
from stack.config import LanguageModel
from stack.dataset_files import MAX_ROW_BYTES
from stack.datasets import DIALOG, Checked
from stack.errors import TooLarge
from stack.inference import Answer, ask_chat, ask_text
from stack.row_ids import MAX_ID

_ANSWER = {"id": Kind.text, "answer": Kind.text, "stop_reason": Kind.text}
_TOKENS = {"prompt_tokens": Kind.number, "completion_tokens": Kind.number}
# What requests to answer have of a job's.
_OF_TEXTS = ("model", "sampling_params", "logprobs")
_OF_CHATS = (*_OF_TEXTS, "tools", "tool_choice", "tool_prompt_format")
# Beside its id in a row.
MAX_ANSWER_BYTES = MAX_ROW_BYTES - 8 * MAX_ID
_ERROR = {"id": Kind.text, "row": Kind.number, "code": Kind.text, "message": Kind.text}


def answer_all(work: driver.Work, request: BatchInferenceJobRequest) -> driver.Outcome:
    """Asks a model about every row of a data set, and makes data sets of the answers and of the errors."""
    context = work.context
    checked = datasets.resolve(context, request.dataset)
    log = RowLog(work.folder / "rows.jsonl", size_of)
    rows = partial(dataset_source.rows, context, checked, batch_inference.shape_of(request), but=log.rows)
    told = (context.config.model_dump(mode="json"), context.tenant, request.model_dump(mode="json"))
    own, asker = batch_inference.own_model(context, request), _ASKERS[request.kind]
    bounds = Bounds(request.max_failed_rows, context.config.max_dataset_bytes)
    problem = made_data.problem_of(
        lambda: complete(log, lambda: asked(rows, asker, *told, own=own), checked.rows, work.reporter.metrics, bounds)
    )
    return _outcome(work, request, checked, log, problem)


class AnswerChats(Asker):
    """Asks for the answer to each row's dialog."""

    harmless: ClassVar[dict[str, Any]] = {"dialog": [{"role": "user", "content": "Hello"}]}

    def __init__(
        self, config: dict[str, Any], tenant: str, request: dict[str, Any], own: LanguageModel | None = None
    ) -> None:
        super().__init__(config, tenant, own)
        self._request = BatchInferenceJobRequest.model_validate(request)

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        chat = ChatCompletionRequest(messages=DIALOG.validate_python(value["dialog"]), **self._shared(_OF_CHATS))
        return self._result(await patiently(lambda: ask_chat(self._context, chat)))

    def _shared(self, fields: Sequence[str]) -> dict[str, Any]:
        """What is the same for all rows."""
        return {name: getattr(self._request, name) for name in fields}

    def _result(self, answer: Answer) -> dict[str, Any]:
        """The columns of an answer. Raises TooLarge for one that no data set can hold."""
        told: dict[str, Any] = {
            "answer": answer.message.content,
            "stop_reason": answer.message.stop_reason.value,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        if self._request.tools:
            told["tool_calls"] = [call.model_dump(mode="json") for call in answer.message.tool_calls]
        if answer.logprobs is not None:
            told["logprobs"] = [one.logprobs_by_token for one in answer.logprobs]
        if (size := len(text_of(told))) > MAX_ANSWER_BYTES:
            raise TooLarge(f"the answer has {size} bytes as a row; allowed: {MAX_ANSWER_BYTES}")
        return {"result": json.dumps(told)}


class ContinueTexts(AnswerChats):
    """Asks for the continuation of each row's text."""

    harmless: ClassVar[dict[str, Any]] = {"text": "Hello"}

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        text = CompletionRequest(content=value["text"], **self._shared(_OF_TEXTS))
        return self._result(await patiently(lambda: ask_text(self._context, text)))


class EmbedTexts(AnswerChats):
    """Asks for the vector of each row's text. The deployment batches them."""

    harmless: ClassVar[dict[str, Any]] = {"text": "Hello"}

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        texts, request = [value["text"]], self._request
        found = await patiently(lambda: self._context.models.embed(request.model, texts, request.truncate))
        told = {"embedding": found.vectors[0].tolist(), "prompt_tokens": found.tokens}
        return {"result": json.dumps(told)}


_ASKERS: dict[BatchKind, type[Asker]] = {
    BatchKind.chat_completion: AnswerChats,
    BatchKind.completion: ContinueTexts,
    BatchKind.embeddings: EmbedTexts,
}


def columns(request: BatchInferenceJobRequest) -> dict[str, Kind]:
    """The columns of the data set of answers."""
    if request.kind == BatchKind.embeddings:
        return {"id": Kind.text, "embedding": Kind.json, "prompt_tokens": Kind.number}
    return (
        _ANSWER
        | _TOKENS
        | ({"tool_calls": Kind.json} if request.tools else {})
        | ({"logprobs": Kind.json} if request.logprobs is not None else {})
    )


def answers(log: RowLog) -> Iterator[dict[str, Any]]:
    """The rows that have an answer, with their ids."""
    return (_answer(line) for line in log if line["error"] is None)


def errors(log: RowLog) -> Iterator[dict[str, Any]]:
    """The rows that have none, with their ids, their numbers, and why."""
    for line in log:
        if (error := line["error"]) is not None:
            yield {"id": line["value"]["id"], "row": line["row"], "code": error["code"], "message": error["message"]}


def size_of(line: dict[str, Any]) -> int:
    """How many bytes the answer of a line has as a row."""
    return 0 if line["error"] is not None else len(text_of(_answer(line)))


def _answer(line: dict[str, Any]) -> dict[str, Any]:
    return {"id": line["value"]["id"], **line["result"]}


def _outcome(
    work: driver.Work,
    request: BatchInferenceJobRequest,
    checked: Checked,
    log: RowLog,
    problem: str | None,
) -> driver.Outcome:
    totals = _totals(log) | {"seconds": log.seconds}
    lineage = _lineage(request, checked)
    results = made_data.results_folder(work)
    names = made_datasets.names_of(jobs.BATCH_INFERENCE, request.model_dump(mode="json"))
    made = []
    for name, what, rows, kinds in zip(
        names,
        (made_datasets.ANSWERS, made_datasets.ERRORS),
        (answers(log), errors(log)),
        (columns(request), _ERROR),
        strict=True,
    ):
        file = work.folder / f"{what}.jsonl"
        write_rows(file, rows)
        made.append(MadeData(what, name, file, kinds))
    registered = made_data.register(work, made, lineage, results, problem)
    work.reporter.metrics.log(0, totals.items())
    about = lineage | {"datasets": registered.datasets}
    (results / "lineage.json").write_text(json.dumps(about | {"totals": totals}, indent=2))
    return made_data.outcome(work, jobs.BATCHES, results, registered, about)


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
        "dataset": made_datasets.address_of(request.dataset),
        "prompts_sha256": checked.sha256,
        "parameters": request.model_dump(mode="json", exclude={"dataset", "job_uuid", "model", "priority"}),
        "code_sha256": made_datasets.code_version(),
    }


if __name__ == "__main__":
    sys.exit(driver.run(BatchInferenceJobRequest, batch_inference.submit, batch_inference.resources, answer_all))
