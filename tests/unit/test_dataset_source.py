"""Data sets as jobs read them: by the read task of Ray Data's source, and on disk for trainers."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

from stack import datasets
from stack.api.datasets import TrainEvalDataset
from stack.context import Context
from stack.errors import BadInput, Conflict
from tests.samples import DIALOG, dataset, write_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import dataset_source
    from jobs.dataset_source import Examples, on_disk

TOOL = {"role": "ipython", "call_id": "1", "tool_name": "brave_search", "content": "Paris it is"}


def dialog(number: int) -> dict[str, Any]:
    return {
        "dialog": [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": str(number)}]
    }


@pytest.fixture
def file(home: Path) -> Path:
    return write_rows(home / "data" / "a.jsonl", [dialog(number) for number in range(1, 26)])


def checked(context: Context, file: Path) -> datasets.Checked:
    return datasets.check(context, TrainEvalDataset.model_validate(dataset(file)))


def blocks(source: Examples) -> list[Any]:
    """What the one read task gives, as a worker gets it."""
    (task,) = source.get_read_tasks(parallelism=8)
    return list(pickle.loads(pickle.dumps(task))())


def test_the_examples_are_read_in_bounded_blocks(context: Context, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_source, "BLOCK_ROWS", 10)
    found = blocks(Examples(context, checked(context, file), frozenset()))
    assert [block.num_rows for block in found] == [10, 10, 5]
    assert all(block.schema == dataset_source.QUESTIONS for block in found)
    rows = [row for block in found for row in block.to_pylist()]
    assert [row["row"] for row in rows] == list(range(1, 26))
    assert rows[6] == {
        "row": 7,
        "messages": json.dumps([{"role": "user", "content": "question 7"}]),
        "expected": "7",
    }


def test_blocks_are_bounded_in_bytes_too(context: Context, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_source, "BLOCK_BYTES", 100)
    assert max(block.num_rows for block in blocks(Examples(context, checked(context, file), frozenset()))) <= 3


def test_rows_that_were_answered_are_left_out(context: Context, file: Path) -> None:
    answered = frozenset(range(1, 26)) - {3, 25}
    found = blocks(Examples(context, checked(context, file), answered))
    assert [row["row"] for block in found for row in block.to_pylist()] == [3, 25]
    assert blocks(Examples(context, checked(context, file), frozenset(range(1, 26)))) == []


def test_content_that_has_changed_is_not_asked_about(context: Context, file: Path) -> None:
    source = Examples(context, checked(context, file), frozenset())
    write_rows(file, [dialog(1)])
    with pytest.raises(Conflict, match="has changed"):
        blocks(source)


def test_the_source_reads_in_the_name_of_its_tenant(context: Context, file: Path, tmp_path: Path) -> None:
    from stack import uploads

    acme = context.of_tenant("acme")
    with uploads.receive(acme, "a.jsonl") as upload:
        upload.write(file.read_bytes())
        url = upload.publish().content_url
    described = TrainEvalDataset.model_validate({"columns": {"dialog": "dialog"}, "content_url": url})
    found = blocks(Examples(acme, datasets.check(acme, described), frozenset()))
    assert sum(block.num_rows for block in found) == 25


def test_examples_on_disk_are_what_a_trainer_takes(context: Context, home: Path, tmp_path: Path) -> None:
    rows = [{"dialog": DIALOG}, *(dialog(number) for number in range(2_000)), {"dialog": [DIALOG[1], TOOL, DIALOG[2]]}]
    context = Context(
        context.config.model_copy(update={"max_dataset_bytes": 2**20}), context.store, context.artifacts, context.engine
    )
    found = on_disk(context, checked(context, write_rows(home / "data" / "b.jsonl", rows)), str(tmp_path / "cache"))
    assert len(found) == 2_002
    assert found[2]["prompt"] == [{"role": "user", "content": "question 1", "tool_call_id": None}]
    assert found[2]["completion"] == [{"role": "assistant", "content": "1"}]
    assert found[2_001]["prompt"][1] == {"role": "tool", "content": "Paris it is", "tool_call_id": "1"}
    (cached, *_) = found.cache_files
    assert Path(cached["filename"]).is_relative_to(tmp_path / "cache")


def test_without_tools_messages_have_a_role_and_content_alone(context: Context, file: Path, tmp_path: Path) -> None:
    found = on_disk(context, checked(context, file), str(tmp_path / "cache"))
    assert found[0] == {
        "prompt": [{"role": "user", "content": "question 1"}],
        "completion": [{"role": "assistant", "content": "1"}],
    }


def test_what_is_wrong_is_raised_as_it_is(context: Context, home: Path, tmp_path: Path) -> None:
    file = write_rows(home / "data" / "b.jsonl", [dialog(1), {"dialog": DIALOG[:2]}])
    with pytest.raises(BadInput, match="row 2: the dialog"):
        on_disk(context, checked(context, file), str(tmp_path / "cache"))
    found = checked(context, file)
    write_rows(file, [dialog(1)])
    with pytest.raises(Conflict, match="has changed"):
        on_disk(context, found, str(tmp_path / "cache"))
