"""Data sets: which files may be read, what is wrong with a row, and the examples in them."""

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import update

from stack import dataset_files, datasets, uploads
from stack.api.datasets import CreateDatasetRequest, TrainEvalDataset
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.api.wire import describe
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, TooLarge
from stack.store import schema
from tests.samples import DIALOG, add_job, dataset, dialogs, evaluation, fail, start, write_rows

QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
def data(context: Context, home: Path) -> Path:
    """The folder whose files may be read."""
    return home / "data"


def described(file: Path, **columns: str) -> TrainEvalDataset:
    return TrainEvalDataset.model_validate(dataset(file, **columns))


def at(url: str) -> TrainEvalDataset:
    return TrainEvalDataset.model_validate({"columns": {"dialog": "dialog"}, "content_url": url})


def checked(context: Context, file: Path, **columns: str) -> datasets.Checked:
    return datasets.check(context, described(file, **columns))


def create_request(uuid: str, file: Path, **columns: str) -> CreateDatasetRequest:
    return CreateDatasetRequest.model_validate({"uuid": uuid, "dataset": dataset(file, **columns)})


def refusal(context: Context, checked: TrainEvalDataset) -> str:
    with pytest.raises(BadInput) as caught:
        datasets.check(context, checked)
    return caught.value.message


def test_a_data_set_is_registered_with_its_rows_bytes_and_hash(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(3))
    registered = datasets.create(context, create_request("a", file))
    assert (registered.uuid, registered.rows, registered.bytes) == ("a", 3, file.stat().st_size)
    assert registered.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert datasets.get(context, "a") == registered


def test_registering_the_same_again_changes_nothing(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(3))
    first = datasets.create(context, create_request("a", file))
    file.unlink()
    assert datasets.create(context, create_request("a", file)) == first


def test_registering_something_else_under_the_same_uuid_is_a_conflict(context: Context, data: Path) -> None:
    first = datasets.create(context, create_request("a", write_rows(data / "a.jsonl", dialogs(3))))
    with pytest.raises(Conflict, match="'a'"):
        datasets.create(context, create_request("a", write_rows(data / "b.jsonl", dialogs(3))))
    assert datasets.get(context, "a") == first


def test_a_refused_data_set_is_not_registered(context: Context, data: Path) -> None:
    with pytest.raises(BadInput):
        datasets.create(context, create_request("a", write_rows(data / "a.jsonl", [])))
    with pytest.raises(NotFound, match="'a'"):
        datasets.get(context, "a")


def test_a_reference_is_a_registered_data_set_or_a_described_one(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(1))
    datasets.create(context, create_request("a", file))
    assert datasets.resolve(context, "a") == datasets.resolve(context, described(file))


def test_a_described_data_set_is_checked_when_it_is_used(context: Context, data: Path) -> None:
    with pytest.raises(BadInput, match="there is no file"):
        datasets.resolve(context, described(data / "none.jsonl"))
    with pytest.raises(NotFound, match="'none'"):
        datasets.resolve(context, "none")


# Which files may be read


def test_a_missing_file_is_named(context: Context, data: Path) -> None:
    assert refusal(context, described(data / "none.jsonl")) == f"there is no file file://{data}/none.jsonl"


def test_a_folder_is_no_file(context: Context, data: Path) -> None:
    (data / "folder.jsonl").mkdir()
    assert "there is no file" in refusal(context, described(data / "folder.jsonl"))


@pytest.mark.parametrize(
    "name", ["outside.jsonl", "data/../outside.jsonl", "data/%2e%2e/outside.jsonl", "data2/a.jsonl"]
)
def test_a_file_outside_of_the_data_folders_is_refused(context: Context, data: Path, home: Path, name: str) -> None:
    write_rows(home / "outside.jsonl", dialogs(1))
    (home / "data2").mkdir()
    write_rows(home / "data2" / "a.jsonl", dialogs(1))
    message = refusal(context, at(f"file://{home}/{name}"))
    assert "is outside of the data folders" in message
    assert message.endswith(str(data))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "file:///", "file://", "file:///proc/self/environ"])
def test_the_systems_files_are_refused(context: Context, url: str) -> None:
    assert "is outside of the data folders" in refusal(context, at(url))


def test_a_symbolic_link_that_leaves_the_data_folder_is_refused(context: Context, data: Path, home: Path) -> None:
    write_rows(home / "outside.jsonl", dialogs(1))
    (data / "link.jsonl").symlink_to(home / "outside.jsonl")
    (data / "folder").symlink_to(home)
    for url in (f"file://{data}/link.jsonl", f"file://{data}/folder/outside.jsonl"):
        assert "is outside of the data folders" in refusal(context, at(url))


def test_a_symbolic_link_within_the_data_folder_is_followed(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(2))
    (data / "link.jsonl").symlink_to(file)
    assert datasets.check(context, at(f"file://{data}/link.jsonl")).rows == 2


@pytest.mark.parametrize(
    "url",
    [
        "file://other-machine{data}/a.jsonl",
        "file://[/a.jsonl",
        "file://{data}/a%00.jsonl",
        "file://{data}/{long}.jsonl",
    ],
    ids=["another machine", "half an address", "NUL", "a name that is too long"],
)
def test_addresses_that_no_file_can_have_are_refused(context: Context, data: Path, url: str) -> None:
    write_rows(data / "a.jsonl", dialogs(1))
    assert "file://" in refusal(context, at(url.format(data=data, long="x" * 300)))


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org/a.jsonl", "ftp://example.org/a.jsonl", "data:,x", "hf://a/b.jsonl", "memory://a.jsonl"),
        *("/srv/a.jsonl", "", "a.jsonl", " file:///a.jsonl", "FILE:///a.jsonl"),
    ],
)
def test_only_addresses_of_these_kinds_are_taken(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        at(url)
    assert "content_url" in describe(caught.value)
    assert "^(file|upload|s3|gs|https)://" in describe(caught.value)


def test_an_escaped_address_leads_to_its_file(context: Context, data: Path) -> None:
    file = write_rows(data / "a b ä.jsonl", dialogs(1))
    assert "%20" in file.as_uri()
    assert datasets.check(context, described(file)).rows == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.zip", "a.parquet.gz", "a.gz", "a", "jsonl"])
def test_a_file_of_another_kind_is_refused_with_what_is_allowed(context: Context, data: Path, name: str) -> None:
    assert "it must end with one of .jsonl, .ndjson, .json, .csv, .parquet" in refusal(
        context, described(write_rows(data / name, dialogs(1)))
    )


# What is wrong with a file


def test_an_empty_file_is_refused(context: Context, data: Path) -> None:
    assert refusal(context, described(write_rows(data / "a.jsonl", []))).endswith("a.jsonl has no rows")


def test_a_file_over_its_bound_is_refused(context: Context, data: Path) -> None:
    limit = context.config.max_dataset_bytes
    row = json.dumps({"dialog": DIALOG})
    line = f"{row}{' ' * (1024 - len(row) - 1)}\n"
    file = data / "a.jsonl"
    file.write_text(line * (limit // 1024))
    assert datasets.check(context, described(file)).bytes == limit
    file.write_text(line * (limit // 1024) + line)
    with pytest.raises(TooLarge, match=f"allowed: {limit}"):
        datasets.check(context, described(file))


def test_a_row_over_its_bound_is_refused(context: Context, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "MAX_ROW_BYTES", 1_000)
    file = write_rows(data / "a.jsonl", [*dialogs(1), {"dialog": DIALOG, "more": "x" * 1_000}])
    assert refusal(context, described(file)) == "row 2 has more than 1000 bytes"


@pytest.mark.parametrize(
    "line",
    [b'{"dialog": [', b"", b"nonsense", b"{'dialog': []}", b'{"dialog": "\xff"}', b"[" * 20_000, b"9" * 10_000],
    ids=["cut off", "empty", "no JSON", "single quotes", "not UTF-8", "too deep", "too long a number"],
)
def test_a_malformed_row_is_named(context: Context, data: Path, line: bytes) -> None:
    rows = [json.dumps({"dialog": DIALOG}).encode()] * 20
    rows[16] = line
    file = data / "a.jsonl"
    file.write_bytes(b"\n".join(rows) + b"\n")
    assert refusal(context, described(file)).startswith("row 17 is not JSON")


@pytest.mark.parametrize("row", [[], "text", 5, None])
def test_a_row_that_is_no_object_is_named(context: Context, data: Path, row: Any) -> None:
    file = write_rows(data / "a.jsonl", [*dialogs(1), row])
    assert refusal(context, described(file)) == "row 2 is not a JSON object with the declared columns"


def test_a_row_that_lacks_a_declared_column_is_named_with_what_it_has(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "answer": "b"}])
    message = refusal(context, described(file, prompt="text", completion="text"))
    assert message == "row 2 lacks the declared column 'completion'; it has: prompt, answer"


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        ("text", 5, "holds the number 5"),
        ("text", None, "holds null"),
        ("media", ["a"], "holds a list"),
        ("number", "5", "holds the text '5'"),
        ("number", True, "holds true"),
        ("dialog", "hello", "is not a list of messages"),
        ("dialog", [{"role": "robot", "content": "a"}], "'robot'"),
        ("dialog", [{"role": "user"}], "0.content: is required"),
        ("dialog", [{"role": "user", "content": "a", "nmae": 1}], "unknown key 'nmae'"),
    ],
)
def test_a_value_of_another_type_than_declared_is_named(
    context: Context, data: Path, kind: str, value: Any, found: str
) -> None:
    right = {"text": "a", "media": "file:///a.png", "number": 1.5, "dialog": DIALOG}
    file = write_rows(data / "a.jsonl", [{"x": right[kind]}, {"x": value}])
    message = refusal(context, described(file, x=kind))
    assert message.startswith(f"row 2: the column 'x' is declared as {kind}, but ")
    assert found in message


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", ""),
        ("media", "a"),
        ("number", 5),
        ("number", -0.5),
        ("json", None),
        ("json", {"a": [1]}),
        ("dialog", DIALOG),
    ],
)
def test_values_of_the_declared_type_are_taken(context: Context, data: Path, kind: str, value: Any) -> None:
    checked = described(write_rows(data / "a.jsonl", [{"x": value, "undeclared": 1}]), x=kind)
    assert list(datasets.rows(context, datasets.check(context, checked))) == [(1, {"x": value})]


def test_a_last_line_without_its_end_counts(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(2))
    file.write_text(file.read_text().removesuffix("\n"))
    assert datasets.check(context, described(file)).rows == 2


@pytest.mark.parametrize("is_registered", [True, False], ids=["registered", "described"])
def test_whoever_finds_other_content_than_was_checked_gets_both_hashes(
    context: Context, data: Path, is_registered: bool
) -> None:
    file = write_rows(data / "a.jsonl", dialogs(2))
    before = datasets.create(context, create_request("a", file)).sha256
    found = datasets.resolve(context, "a" if is_registered else described(file))
    write_rows(file, dialogs(3))
    for read in (datasets.rows, datasets.examples):
        with pytest.raises(Conflict, match="has changed") as caught:
            list(read(context, found))
        assert before in caught.value.message
        assert hashlib.sha256(file.read_bytes()).hexdigest() in caught.value.message


def test_a_job_on_a_registered_data_set_whose_file_has_changed_is_not_accepted(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(2))
    datasets.create(context, create_request("a", file))
    write_rows(file, dialogs(3))
    with pytest.raises(Conflict, match="has changed"):
        datasets.check_shape(context, "a", "dataset", datasets.EXAMPLES)


def test_a_registered_file_of_the_same_size_that_has_changed_is_found_out(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(2))
    before = datasets.create(context, create_request("a", file)).sha256
    other = file.read_bytes().replace(b"Paris", b"Lyons")
    assert len(other) == file.stat().st_size
    file.write_bytes(other)
    os.utime(file, (0, 0))
    for look in (
        lambda: datasets.check_shape(context, "a", "dataset", datasets.EXAMPLES),
        lambda: datasets.preview(context, "a", 1),
    ):
        with pytest.raises(Conflict, match="has changed") as caught:
            look()
        assert before in caught.value.message
        assert hashlib.sha256(other).hexdigest() in caught.value.message


def test_of_a_registered_data_set_of_examples_nothing_is_read_again(
    context: Context, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(data / "a.jsonl", dialogs(3))
    assert datasets.create(context, create_request("a", file)).examples
    with context.store.engine.begin() as connection:  # it was registered a while after the file was written
        connection.execute(update(schema.datasets).values(created_at="2999-01-01T00:00:00.000Z"))
    monkeypatch.setattr(datasets, "read", None)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert datasets.check_shape(context, "a", "dataset", datasets.EXAMPLES).rows == 3


def test_a_registered_data_set_without_examples_is_refused_with_the_row(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", [{"dialog": DIALOG}, {"dialog": DIALOG[:2]}])
    assert datasets.create(context, create_request("a", file)).examples is False
    with pytest.raises(BadInput, match="row 2: the dialog in 'dialog' does not end with an answer"):
        datasets.check_shape(context, "a", "dataset", datasets.EXAMPLES)
    other = write_rows(data / "b.jsonl", [{"x": 1}])
    assert datasets.create(context, create_request("b", other, x="number")).examples is False
    with pytest.raises(BadInput, match="one column of type dialog"):
        datasets.check_shape(context, "b", "dataset", datasets.EXAMPLES)


def test_a_data_set_of_the_first_release_is_read_through(context: Context, data: Path) -> None:
    datasets.create(context, create_request("a", write_rows(data / "a.jsonl", [{"dialog": DIALOG[:2]}])))
    with context.store.engine.begin() as connection:
        connection.execute(update(schema.datasets).values(examples=None))
    with pytest.raises(BadInput, match="row 1: the dialog"):
        datasets.check_shape(context, "a", "dataset", datasets.EXAMPLES)


def test_a_data_set_may_be_registered_with_its_hash(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(2))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    plain, right, wrong = (
        CreateDatasetRequest.model_validate({"uuid": "a", "dataset": dataset(file) | {"sha256": given}})
        for given in (None, sha256, "0" * 64)
    )
    with pytest.raises(Conflict, match=sha256):
        datasets.create(context, wrong)
    first = datasets.create(context, right)
    assert datasets.create(context, plain) == first
    with pytest.raises(Conflict, match="another data set"):
        datasets.create(context, wrong)


def test_the_size_of_packed_rows_is_guessed_within_the_bound(context: Context, data: Path) -> None:
    plain = data / "a.jsonl"
    write_rows(plain, dialogs(20))
    packed = data / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    size = datasets.size(context, checked(context, plain))
    assert size == datasets.Size(plain.stat().st_size, 20)
    assert datasets.size(context, checked(context, packed)).text == 10 * packed.stat().st_size
    packed.write_bytes(gzip.compress(plain.read_bytes()) + bytes(60_000))
    wanted = [evaluation(dataset(packed)), evaluation(dataset(plain))]
    found = [
        datasets.sizes_before_reading(context, EvaluateQuestionAnsweringRequest.model_validate(one))[0].text
        for one in wanted
    ]
    assert found == [context.config.max_dataset_bytes, plain.stat().st_size]


def test_the_first_bad_rows_are_all_named(context: Context, data: Path) -> None:
    rows = [{"x": number if number % 3 else "none"} for number in range(1, 100)]
    message = refusal(context, described(write_rows(data / "a.jsonl", rows[:10]), x="number"))
    assert [part.split(":")[0] for part in message.split("; ")] == ["row 3", "row 6", "row 9"]
    message = refusal(context, described(write_rows(data / "a.jsonl", rows), x="number"))
    assert [part.split(":")[0] for part in message.split("; ")[:-1]] == [f"row {3 * one}" for one in range(1, 11)]
    assert message.endswith("; it was read no further")


def test_what_is_wrong_is_said_in_few_words(context: Context, data: Path) -> None:
    rows = [{"x": [{"role": "robot", "content": "x" * 3_000}] * 5}] * 3
    message = refusal(context, described(write_rows(data / "a.jsonl", rows), x="dialog"))
    assert len(message) < 3 * 350


# Previews and lists


def test_a_preview_has_the_first_rows_with_their_declared_columns(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", [{"x": number, "undeclared": 1} for number in range(5)])
    datasets.create(context, create_request("a", file, x="number"))
    assert datasets.preview(context, "a", 3).model_dump() == {
        "dataset_uuid": "a",
        "rows": [{"x": 0}, {"x": 1}, {"x": 2}],
        "more": True,
    }
    assert not datasets.preview(context, "a", 5).more
    with pytest.raises(NotFound, match="'b'"):
        datasets.preview(context, "b", 3)


def test_a_preview_is_bounded_in_bytes(context: Context, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_PREVIEW_BYTES", 1_000)
    file = write_rows(data / "a.jsonl", [{"x": "y" * 400}] * 5)
    datasets.create(context, create_request("a", file, x="text"))
    preview = datasets.preview(context, "a", 5)
    assert (len(preview.rows), preview.more) == (2, True)


def test_data_sets_are_listed_newest_first_a_page_at_a_time(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(1))
    other = context.of_tenant("acme")
    datasets.create(other, create_request("theirs", file))
    made = [datasets.create(context, create_request(f"a{number}", file)) for number in range(5)]
    pages = [datasets.page(context, None, 2)]
    while pages[-1]:
        pages.append(datasets.page(context, pages[-1][-1].uuid, 2))
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    newest = sorted(made, key=lambda one: (one.created_at, one.uuid), reverse=True)
    assert [one for page in pages for one in page] == newest
    with pytest.raises(NotFound, match="'theirs'"):
        datasets.page(context, "theirs", 2)


# Deletion


def test_a_deleted_data_set_is_gone_and_its_file_is_not(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(1))
    datasets.create(context, create_request("a", file))
    datasets.create(context.of_tenant("acme"), create_request("a", file))
    datasets.delete(context, "a")
    with pytest.raises(NotFound):
        datasets.get(context, "a")
    with pytest.raises(NotFound):
        datasets.delete(context, "a")
    assert file.exists()
    assert datasets.get(context.of_tenant("acme"), "a").rows == 1


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_data_set_is_kept_while_a_job_needs_it(context: Context, data: Path, field: str) -> None:
    datasets.create(context, create_request("a", write_rows(data / "a.jsonl", dialogs(1))))
    add_job(context.store, "evaluation-1", **{field: "a"})
    start(context.store, "evaluation-1")
    with pytest.raises(Conflict, match="the job 'evaluation-1' needs the data set 'a' and has not ended"):
        datasets.delete(context, "a")
    fail(context.store, "evaluation-1", "it is over")
    datasets.delete(context, "a")


def test_an_upload_is_kept_while_a_job_describes_it(context: Context) -> None:
    with uploads.receive(context, "a.jsonl") as file:
        file.write(json.dumps({"dialog": DIALOG}).encode())
        sent = file.publish()
    described = {"columns": {"dialog": "dialog"}, "content_url": sent.content_url}
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "a", "dataset": described}))
    # Whatever else stands in a request: PostgreSQL's texts hold no NUL.
    add_job(context.store, "evaluation-1", dataset=described | {"metadata": {"a": "\0"}})
    with pytest.raises(Conflict, match="'evaluation-1'"):
        datasets.delete(context, "a")
    fail(context.store, "evaluation-1", "it is over")
    datasets.delete(context, "a")


def test_jobs_of_others_and_on_other_data_sets_keep_nothing(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", dialogs(1))
    datasets.create(context, create_request("a", file))
    add_job(context.store, "theirs", tenant="acme", dataset="a")
    add_job(context.store, "mine", dataset=dataset(file), model="a")
    datasets.delete(context, "a")


# Examples


def test_examples_of_dialogs_are_the_messages_and_the_last_answer(context: Context, data: Path) -> None:
    chat = [QUESTION, {"role": "assistant", "content": ["Par", "is"]}]
    file = write_rows(data / "a.jsonl", [{"dialog": DIALOG}, {"dialog": chat}])
    first, second = datasets.examples(context, checked(context, file))
    assert (first.messages, first.answer) == (DIALOG[:2], "Paris")
    assert (second.messages, second.answer) == ([QUESTION], "Paris")


def test_the_dialog_column_may_have_any_name(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", [{"chat": DIALOG, "prompt": "a"}])
    (example,) = datasets.examples(context, checked(context, file, chat="dialog", prompt="text"))
    assert example.answer == "Paris"


def test_examples_of_prompts_are_a_user_message_and_the_completion(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", [{"prompt": "One, two", "completion": ", three", "source": "me"}])
    (example,) = datasets.examples(context, checked(context, file, prompt="text", completion="text", source="text"))
    assert example == datasets.Example([{"role": "user", "content": "One, two"}], ", three")


@pytest.mark.parametrize(
    "dialog",
    [[], DIALOG[2:], DIALOG[:2], [*DIALOG, QUESTION]],
    ids=["empty", "only an answer", "no answer", "after it"],
)
def test_a_dialog_that_does_not_end_with_an_answer_is_named(
    context: Context, data: Path, dialog: list[dict[str, Any]]
) -> None:
    file = write_rows(data / "a.jsonl", [{"dialog": DIALOG}, {"dialog": dialog}])
    with pytest.raises(BadInput, match="row 2: the dialog in 'dialog' does not end with an answer of the assistant"):
        list(datasets.examples(context, checked(context, file)))


def test_a_dialog_with_tool_calls_is_refused_with_its_row(context: Context, data: Path) -> None:
    call = {"call_id": "1", "tool_name": "brave_search", "arguments": {}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    file = write_rows(data / "a.jsonl", [{"dialog": DIALOG}, {"dialog": [QUESTION, answer]}])
    with pytest.raises(BadInput, match=r"row 2.*tool calls"):
        list(datasets.examples(context, checked(context, file)))


@pytest.mark.parametrize("place", ["question", "context", "answer"])
def test_a_dialog_with_an_attachment_is_refused_with_its_row(context: Context, data: Path, place: str) -> None:
    attachment = {"content": "a,b", "mime_type": "text/csv"}
    question = {"role": "user", "content": attachment if place == "question" else "Where?"}
    if place == "context":
        question["context"] = [attachment]
    answer = {"role": "assistant", "content": ["There.", attachment] if place == "answer" else "There."}
    file = write_rows(data / "a.jsonl", [{"dialog": DIALOG}, {"dialog": [question, answer]}])
    with pytest.raises(BadInput, match=r"row 2: an attachment cannot be used here; allowed: text"):
        list(datasets.examples(context, checked(context, file)))


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "text"},
        {"prompt": "text", "completion": "json"},
        {"a": "dialog", "b": "dialog"},
        {"question": "text"},
    ],
)
def test_columns_without_examples_are_refused_with_what_is_allowed(context: Context, columns: dict[str, str]) -> None:
    described = TrainEvalDataset.model_validate({"columns": columns, "content_url": "file:///a.jsonl"})
    with pytest.raises(BadInput) as caught:
        datasets.check_shape(context, described, "dataset", datasets.EXAMPLES)
    for word in ("dialog", "prompt and completion", *(f"{name} ({kind})" for name, kind in columns.items())):
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"dialog": DIALOG[:2]}, "row 2: the dialog in 'dialog' does not end with an answer"),
        ({"dialog": "hello"}, "row 2: the column 'dialog'"),
        ({"chat": DIALOG}, "row 2 lacks the declared column 'dialog'"),
    ],
)
def test_examples_are_all_read_before_any_work_and_refused_with_their_field(
    context: Context, data: Path, row: dict[str, Any], words: str
) -> None:
    file = write_rows(data / "a.jsonl", [{"dialog": DIALOG}, row])
    with pytest.raises(BadInput, match=words) as caught:
        datasets.check_shape(context, described(file), "validation_dataset", datasets.EXAMPLES)
    assert caught.value.param == "validation_dataset"
