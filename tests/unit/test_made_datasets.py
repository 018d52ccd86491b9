"""Data sets that jobs make: registered once, with where they come from."""

from pathlib import Path
from typing import Any

import pytest

from stack import datasets, jobs, made_datasets, uploads
from stack.api.datasets import CreateDatasetRequest
from stack.api.datasets import TrainEvalDatasetColumnType as Kind
from stack.context import Context
from stack.errors import BadInput, Conflict, TooLarge
from tests import samples
from tests.samples import dataset, dialogs, write_rows

COLUMNS = {"id": Kind.text, "score": Kind.number}
LINEAGE: dict[str, Any] = {"job_uuid": "grow-1", "model": "small", "prompts_sha256": "0" * 64}


def rows(home: Path, count: int, score: float = 0.5) -> Path:
    return write_rows(home / "made.jsonl", [{"id": str(number), "score": score} for number in range(count)])


def test_a_file_of_rows_becomes_a_data_set_with_its_lineage(context: Context, home: Path) -> None:
    made = made_datasets.register(context, "mine", rows(home, 3), COLUMNS, LINEAGE)
    assert made is not None
    assert made == datasets.get(context, "mine")
    assert (made.rows, made.columns, made.metadata) == (3, COLUMNS, LINEAGE)
    assert made.sha256 == made_datasets.sha256(home / "made.jsonl")
    assert [row["id"] for row in datasets.preview(context, "mine", 10).rows] == ["0", "1", "2"]


def test_it_is_its_tenants(context: Context, home: Path) -> None:
    made_datasets.register(context.of_tenant("acme"), "mine", rows(home, 1), COLUMNS, LINEAGE)
    assert context.store.datasets.get("default", "mine") is None
    assert context.store.datasets.get("acme", "mine") is not None


def test_no_rows_are_no_data_set(context: Context, home: Path) -> None:
    assert made_datasets.register(context, "mine", rows(home, 0), COLUMNS, LINEAGE) is None
    assert made_datasets.register(context, "mine", home / "none.jsonl", COLUMNS, LINEAGE) is None


def test_what_a_lost_attempt_has_registered_is_kept_if_it_is_the_same_and_replaced_if_not(
    context: Context, home: Path
) -> None:
    first = made_datasets.register(context, "mine", rows(home, 3), COLUMNS, LINEAGE)
    assert made_datasets.register(context, "mine", rows(home, 3), COLUMNS, LINEAGE) == first
    assert len(uploads.page(context, None, 10)) == 1
    other = made_datasets.register(context, "mine", rows(home, 4), COLUMNS, LINEAGE)
    assert other is not None
    assert other.rows == 4
    assert len(uploads.page(context, None, 10)) == 1


def test_a_data_set_of_the_same_id_that_is_anothers_stays(context: Context, home: Path) -> None:
    data = dataset(write_rows(home / "data" / "a.jsonl", dialogs(2)))
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "mine", "dataset": data}))
    with pytest.raises(Conflict, match="a data set 'mine' already, which this job has not made"):
        made_datasets.register(context, "mine", rows(home, 3), COLUMNS, LINEAGE)
    taken = {"job_uuid": "grow-1", "output_dataset": "mine"}
    with pytest.raises(Conflict, match="a data set 'mine' already; choose another output_dataset") as caught:
        made_datasets.require_free(context, jobs.GENERATE, taken, "output_dataset")
    assert caught.value.param == "output_dataset"
    with pytest.raises(Conflict, match="a data set 'mine' already, which this job has not made"):
        made_datasets.require_still_free(context, jobs.GENERATE, taken)
    jobs.work_folder("default", "grow-1").mkdir(parents=True)
    made_datasets.require_still_free(context, jobs.GENERATE, taken)
    made_datasets.require_free(context, jobs.GENERATE, {"job_uuid": "yours"}, "output_dataset")
    made_datasets.require_still_free(context, jobs.GENERATE, {"job_uuid": "yours"})
    assert datasets.get(context, "mine").rows == 2


def test_rows_over_the_bound_of_a_data_set_are_told(context: Context, home: Path) -> None:
    with pytest.raises(TooLarge, match="has more than 65536 bytes"):
        made_datasets.register(context, "mine", rows(home, 5_000), COLUMNS, LINEAGE)


def test_the_code_has_a_version() -> None:
    assert made_datasets.code_version() == made_datasets.code_version()
    assert len(made_datasets.code_version()) == 64


@pytest.mark.parametrize(
    ("kind", "request_", "names"),
    [
        (jobs.GENERATE, {"job_uuid": "a", "output_dataset": None}, ["a"]),
        (jobs.GENERATE, {"job_uuid": "a", "output_dataset": "b"}, ["b"]),
        (jobs.BATCH_INFERENCE, {"job_uuid": "a"}, ["a.answers", "a.errors"]),
        (jobs.EVALUATE, {"job_uuid": "a"}, []),
    ],
)
def test_what_a_job_makes_is_known_before(kind: str, request_: dict[str, Any], names: list[str]) -> None:
    assert made_datasets.names_of(kind, request_) == names


def test_a_data_set_that_another_job_is_going_to_make_is_taken_until_that_has_ended(context: Context) -> None:
    samples.add_job(context.store, "batch-1", jobs.BATCH_INFERENCE, job_uuid="batch-1")
    wanted = {"job_uuid": "grow-1", "output_dataset": "batch-1.errors"}
    with pytest.raises(Conflict, match=r"the job 'batch-1' is going to make a data set 'batch-1\.errors'"):
        made_datasets.require_free(context, jobs.GENERATE, wanted, "output_dataset")
    made_datasets.require_free(context.of_tenant("acme"), jobs.GENERATE, wanted, "output_dataset")
    samples.fail(context.store, "batch-1", "it did not work")
    made_datasets.require_free(context, jobs.GENERATE, wanted, "output_dataset")


def test_rows_that_cannot_be_registered_leave_no_upload(context: Context, home: Path) -> None:
    with pytest.raises(BadInput, match="lacks the declared column 'text'"):
        made_datasets.register(context, "mine", rows(home, 3), {"text": Kind.text}, LINEAGE)
    assert uploads.page(context, None, 10) == []


def test_what_a_job_has_registered_that_is_not_completed_is_removed_and_no_others(context: Context, home: Path) -> None:
    job = samples.add_job(context.store, "grow-1", jobs.GENERATE, job_uuid="grow-1", output_dataset="mine")
    made_datasets.register(context, "mine", rows(home, 3), COLUMNS, LINEAGE)
    made_datasets.forget(context, samples.add_job(context.store, "grow-2", jobs.GENERATE, job_uuid="mine"))
    assert datasets.get(context, "mine").rows == 3
    made_datasets.forget(context, job)
    assert context.store.datasets.get("default", "mine") is None
    assert uploads.page(context, None, 10) == []
