"""The ids of rows: what is one, and that no two are the same."""

from pathlib import Path

import pytest

from stack.api.datasets import TrainEvalDataset
from stack.errors import BadInput
from stack.row_ids import MAX_ID, SeenIds, id_of


def described(**columns: str) -> TrainEvalDataset:
    return TrainEvalDataset.model_validate({"columns": columns, "content_url": "upload://a/b.jsonl"})


def test_an_id_is_what_stands_in_its_column_or_the_number_of_the_row() -> None:
    assert id_of(7, {"text": "a"}, described(text="text")) == "7"
    assert id_of(7, {"id": "a b"}, described(id="text")) == "a b"
    assert [id_of(7, {"id": one}, described(id="number")) for one in (3.0, 3.5, 3)] == ["3", "3.5", "3"]
    assert len(id_of(7, {"id": "x" * MAX_ID}, described(id="text"))) == MAX_ID
    with pytest.raises(BadInput, match="row 7: the id has 1001 characters; allowed: 1 to 1000"):
        id_of(7, {"id": "x" * (MAX_ID + 1)}, described(id="text"))


def test_the_second_row_of_an_id_is_refused_by_the_first(home: Path) -> None:
    with SeenIds() as seen:
        for number, one in enumerate(["a", "A", "a ", "é", "e\u0301", "a\0", "1", "01"], 1):
            seen.add(number, one)
        with pytest.raises(BadInput, match=r"^the rows 4 and 9 have the same id, 'é'$"):
            seen.add(9, "é")


def test_halves_of_letters_are_ids_like_others(home: Path) -> None:
    with SeenIds() as seen:
        for number, one in enumerate(["\ud83d", "\ude00", "\U0001f600", "?"], 1):
            seen.add(number, one)
        with pytest.raises(BadInput, match=r"^the rows 1 and 5 have the same id, '\\ud83d'$"):
            seen.add(5, "\ud83d")


def test_what_is_kept_on_the_disk_is_made_for_the_first_id_and_gone_at_the_end(home: Path) -> None:
    folder = home / "uploads"
    with SeenIds() as seen:
        assert not folder.exists()
        seen.add(1, "a")
        assert [file.name for file in folder.glob("*/*")] == ["ids.db"]
    assert list(folder.iterdir()) == []
