"""What a job has found out about its rows: kept line by line, never twice, and gone on from."""

import json
import random
import tracemalloc
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from stack.context import Context
from stack.errors import TooLarge, TooManyFailed, Unavailable
from tests import samples

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs.reporter import Metrics
    from jobs.row_log import Bounds, RowLog, RowNumbers, complete, cut, fill, line_of, lines_of, text_of, write_rows

BOUNDS = Bounds(failed=10, bytes=1_000_000)


def line(number: int, error: str | None = None) -> dict[str, Any]:
    told = None if error is None else {"code": "bad_input", "message": error, "type": "t", "param": None}
    return {"row": number, "value": {"id": str(number)}, "result": None if told else {"answer": "a"}, "error": told}


def test_numbers_are_a_set() -> None:
    drawn = random.Random(0).sample(range(5_000), 1_000)
    numbers = RowNumbers()
    assert all(numbers.add(one) for one in drawn)
    assert not any(numbers.add(one) for one in drawn)
    assert [one for one in range(5_100) if one in numbers] == sorted(drawn)
    assert len(numbers) == 1_000
    assert "5" not in numbers


def test_a_million_numbers_take_a_bit_each() -> None:
    tracemalloc.start()
    numbers = RowNumbers()
    for one in range(1, 1_000_001):
        numbers.add(one)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 1_000_000


def test_lines_are_kept_and_found_again(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    assert list(log) == []
    assert log.add([line(1), line(3, "it is too long"), line(2)]) == 3
    again = RowLog(tmp_path / "rows.jsonl")
    assert list(again) == [line(1), line(3, "it is too long"), line(2)]
    assert [number for number in range(9) if number in again.rows] == [1, 2, 3]
    assert (again.failed, again.first_error) == (1, "row 3: it is too long")


def test_a_row_is_written_once(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    log.add([line(1), line(1, "again")])
    assert log.add([line(1), line(2)]) == 1
    assert RowLog(tmp_path / "rows.jsonl").add([line(2)]) == 0
    assert [one["row"] for one in log] == [1, 2]
    assert log.failed == 0


def test_a_line_that_was_not_finished_is_cut_off_and_its_row_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    RowLog(file).add([line(1), line(2)])
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps(line(3)).encode()[:-4])
    log = RowLog(file)
    assert 3 not in log.rows
    assert file.read_bytes() == whole
    log.add([line(3)])
    assert [one["row"] for one in RowLog(file)] == [1, 2, 3]


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    cut(tmp_path / "none.jsonl")
    assert list(lines_of(tmp_path / "none.jsonl")) == []
    assert write_rows(tmp_path / "some.jsonl", [{"a": 1}, {"a": "é"}]) == 2
    assert list(lines_of(tmp_path / "some.jsonl")) == [{"a": 1}, {"a": "é"}]
    assert write_rows(tmp_path / "some.jsonl", []) == 0
    assert list(lines_of(tmp_path / "some.jsonl")) == []


def test_a_row_of_ray_data_becomes_a_line() -> None:
    good = {"row": 7, "value": '{"id": "a"}', "result": '{"answer": "b"}', "error": ""}
    assert line_of(good) == {"row": 7, "value": {"id": "a"}, "result": {"answer": "b"}, "error": None}
    bad = good | {"result": "", "error": '{"code": "c", "message": "m"}'}
    assert line_of(bad)["error"] == {"code": "c", "message": "m"}
    assert line_of(bad)["result"] is None


@pytest.fixture
def metrics(context: Context) -> Metrics:
    samples.add_job(context.store, "job-1")
    return Metrics(context.store, samples.start(context.store, "job-1"), 1)


def test_what_comes_is_written_and_how_far_it_is(context: Context, metrics: Metrics, tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    fill(log, (row_of(number) for number in range(1, 101)), 100, metrics, BOUNDS)
    assert [one["row"] for one in log] == [*range(1, 101)]
    metrics.flush()
    job = context.store.jobs.get("default", "job-1")
    assert job is not None
    assert job.progress == {"done": 100, "total": 100, "unit": "rows", "seconds_left": 0}


def test_what_came_before_a_failure_is_kept(metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.row_log.WRITE_ROWS", 10)

    def rows() -> Any:
        for number in range(1, 26):
            yield row_of(number)
        raise ValueError("the worker died")

    with pytest.raises(ValueError, match="the worker died"):
        fill(RowLog(tmp_path / "rows.jsonl"), rows(), 100, metrics, BOUNDS)
    assert len(RowLog(tmp_path / "rows.jsonl").rows) == 25


def test_what_was_worked_counts_in_all_attempts_and_the_time_between_them_does_not(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("jobs.row_log.time.monotonic", lambda: clock[0])

    def rows(numbers: range, seconds: float) -> Generator[dict[str, Any]]:
        for number in numbers:
            clock[0] += seconds
            yield row_of(number)
        raise ValueError("the worker died")

    for numbers, seconds in ((range(1, 5), 2.0), (range(5, 8), 10.0)):
        log = RowLog(tmp_path / "rows.jsonl")
        with pytest.raises(ValueError, match="the worker died"):
            fill(log, rows(numbers, seconds), 100, metrics, BOUNDS)
        clock[0] += 1_000  # until the next attempt begins
    assert RowLog(tmp_path / "rows.jsonl").seconds == 4 * 2.0 + 3 * 10.0


def test_what_a_killed_attempt_has_worked_counts_as_far_as_it_was_noted(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("jobs.row_log.time.monotonic", lambda: clock[0])
    found: list[float] = []

    def rows() -> Generator[dict[str, Any]]:
        for number in (1, 2):
            clock[0] += 5
            yield row_of(number)
        found.append(float((tmp_path / "rows.seconds").read_text()))

    fill(RowLog(tmp_path / "rows.jsonl"), rows(), 2, metrics, BOUNDS)
    assert found == [10.0]


def row_of(number: int, message: str = "") -> dict[str, Any]:
    error = json.dumps({"code": "bad_input", "message": message}) if message else ""
    return {"row": number, "value": "{}", "result": "" if message else "{}", "error": error, "away": ""}


def test_more_failed_rows_than_allowed_end_the_job_with_the_first_error_whoever_has_asked_them(
    metrics: Metrics, tmp_path: Path
) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    fill(log, iter([row_of(1), row_of(2, "it is too long")]), 4, metrics, Bounds(failed=1, bytes=1_000_000))
    again = RowLog(tmp_path / "rows.jsonl")  # as the next attempt finds it
    words = r"^2 rows have failed; allowed: max_failed_rows, 1; the first of them: row 2: it is too long$"
    with pytest.raises(TooManyFailed, match=words):
        fill(again, iter([row_of(3, "it is empty")]), 4, metrics, Bounds(failed=1, bytes=1_000_000))
    assert len(RowLog(tmp_path / "rows.jsonl").rows) == 3


def test_where_no_row_may_fail_the_first_error_ends_the_job(metrics: Metrics, tmp_path: Path) -> None:
    with pytest.raises(TooManyFailed, match=r"^row 7: it is too long$"):
        fill(RowLog(tmp_path / "a.jsonl"), iter([row_of(7, "it is too long")]), 9, metrics, Bounds(0, 1_000_000))


def test_rows_are_asked_no_further_than_what_a_data_set_can_hold(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.row_log.WRITE_ROWS", 10)
    rows = (row_of(number) for number in range(1, 1_001))
    log = RowLog(tmp_path / "rows.jsonl", size=lambda line: 10)
    with pytest.raises(TooLarge, match=r"made of 20 rows has 200 bytes; allowed: max_dataset_bytes, 150"):
        fill(log, rows, 1_000, metrics, Bounds(failed=0, bytes=150))
    assert next(rows)["row"] == 21
    assert RowLog(tmp_path / "rows.jsonl", size=lambda line: 10).bytes == 200


def test_rows_for_which_a_model_was_away_are_left_to_another_attempt_and_all_others_are_kept(
    metrics: Metrics, tmp_path: Path
) -> None:
    away = {"row": 2, "value": "{}", "result": "", "error": "", "away": "it is being started"}
    rows = [row_of(1), away, row_of(3), away | {"row": 4}, row_of(5, "it is too long")]
    log = RowLog(tmp_path / "rows.jsonl")
    with pytest.raises(Unavailable, match=r"^row 2: it is being started$"):
        fill(log, iter(rows), 5, metrics, BOUNDS)
    again = RowLog(tmp_path / "rows.jsonl")
    assert ([one["row"] for one in again], again.failed) == ([1, 3, 5], 1)


def test_only_a_log_without_gaps_is_complete(metrics: Metrics, tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    with pytest.raises(Unavailable, match=r"^2 of 5 rows have no answer$"):
        complete(log, lambda: (row_of(number) for number in (1, 4, 2)), 5, metrics, BOUNDS)
    again = RowLog(tmp_path / "rows.jsonl")
    complete(again, lambda: (row_of(number) for number in (3, 5)), 5, metrics, BOUNDS)
    assert len(again.rows) == 5

    def nobody() -> Generator[dict[str, Any]]:
        raise AssertionError("nothing is left to ask about")

    complete(again, nobody, 5, metrics, BOUNDS)


def test_who_answers_rows_stops_when_the_job_does(metrics: Metrics, tmp_path: Path) -> None:
    stopped = []

    def rows() -> Generator[dict[str, Any]]:
        try:
            for number in range(1, 1_001):
                yield row_of(number, "it is too long")
        finally:
            stopped.append(True)

    with pytest.raises(TooManyFailed):
        complete(RowLog(tmp_path / "rows.jsonl"), rows, 1_000, metrics, Bounds(failed=0))
    assert stopped == [True]


def test_what_is_made_of_rows_may_be_without_bound(metrics: Metrics, tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl", size=lambda line: 2**60)
    complete(log, lambda: (row_of(number) for number in (1, 2)), 2, metrics, Bounds(failed=0))
    assert log.bytes == 2**61


def test_letters_take_no_more_room_than_they_need(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "漢字" * 100}])
    assert (tmp_path / "a.jsonl").stat().st_size == len(text_of({"text": "漢字" * 100})) < 700
    assert list(lines_of(tmp_path / "a.jsonl")) == [{"text": "漢字" * 100}]


def test_the_half_of_a_letter_does_not_end_a_job() -> None:
    assert json.loads(text_of({"text": "a\ud83d \U0001f600"})) == {"text": "a? \U0001f600"}
