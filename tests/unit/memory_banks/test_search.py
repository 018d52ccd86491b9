from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from stack.api.filters import Filter
from stack.api.memory_banks import Language
from stack.errors import BadInput
from stack.memory_banks.arrow import NEVER, Found
from stack.memory_banks.keyvalue import after, by_keys, by_prefix
from stack.memory_banks.rows import Hit
from stack.memory_banks.search import Bounds, Query, fuse, search
from stack.memory_banks.table import Words
from tests.unit.memory_banks.documents import DIMENSIONS, BankTable, document, vector

TEXTS = {
    "tea": "the tea is hot. a tent in rain",
    "sea": "the sea is cold. ships sail on it",
    "run": "she was running home. he walks. they rest",
}


@pytest.fixture
async def bank(tmp_path: Path) -> BankTable:
    table = await BankTable.create(str(tmp_path), DIMENSIONS, Words())
    await table.write(
        [document(id_, text, metadata={"id": id_, "length": len(text)}) for id_, text in TEXTS.items()], replace=False
    )
    return table


def only(value: Any) -> Any:
    return TypeAdapter(Filter).validate_python({"type": "eq", "key": "id", "value": value})


def shown(hits: list[Hit]) -> list[str]:
    return [hit.chunk.text for hit in hits]


async def test_by_vector_the_nearest_by_cosine_come_first(bank: BankTable) -> None:
    asked = vector("a tent in rain") * 7
    hits = await search(bank, Query("vector", vector=asked, max_chunks=100))
    assert len(hits) == 7
    assert hits[0].chunk.text == "a tent in rain"

    def cosine(text: str) -> float:
        other = vector(text)
        return float(asked @ other / np.linalg.norm(asked) / np.linalg.norm(other))

    assert [hit.score for hit in hits] == pytest.approx([cosine(hit.chunk.text) for hit in hits], abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].metadata == {"id": "tea", "length": len(TEXTS["tea"])}


async def test_by_words_all_forms_of_a_word_are_found_and_rare_ones_count_more(bank: BankTable) -> None:
    assert shown(await search(bank, Query("keyword", "RUNS"))) == ["she was running home"]
    assert shown(await search(bank, Query("keyword", "walk sailing")))[:2] == ["he walks", "ships sail on it"]
    assert shown(await search(bank, Query("keyword", "hôt"))) == ["the tea is hot"]
    # Stop words are in every text and find none.
    assert await search(bank, Query("keyword", "the is")) == []


@pytest.mark.parametrize("text", ["", "???", "\0", "text:tea AND (", '"', "tea\\", "{'match': 1}", "x" * 20_000])
async def test_no_text_is_a_wrong_query(bank: BankTable, text: str) -> None:
    hits = await search(bank, Query("keyword", text))
    assert all("tea" in hit.chunk.text for hit in hits)


async def test_languages_have_their_own_forms_and_stop_words(tmp_path: Path) -> None:
    bank = await BankTable.create(str(tmp_path / "de"), None, Words(Language.german))
    await bank.write([document("a", "die Häuser. und der Wald", dimensions=None)], replace=False)
    assert shown(await search(bank, Query("keyword", "Haus häusern"))) == ["die Häuser"]
    assert await search(bank, Query("keyword", "und")) == []
    exact = await BankTable.create(str(tmp_path / "exact"), None, Words(stem=False))
    await exact.write([document("a", "the houses. a house", dimensions=None)], replace=False)
    assert shown(await search(exact, Query("keyword", "houses"))) == ["the houses"]
    assert shown(await search(exact, Query("keyword", "the"))) == ["the houses"]


@pytest.mark.parametrize("language", Language)
async def test_words_are_found_in_texts_of_each_language(tmp_path: Path, language: Language) -> None:
    bank = await BankTable.create(str(tmp_path), None, Words(language))
    texts = {
        "zh": "我们喜欢喝茶",
        "th": "เขาดื่มน้ำชา",
        "ru": "горячий чай",
        "id": "max_token_length",
    }
    await bank.write([document(id_, text, dimensions=None) for id_, text in texts.items()], replace=False)
    for word, id_ in {"喝茶": "zh", "น้ำชา": "th", "чай": "ru", "token": "id"}.items():
        assert [hit.document_id for hit in await search(bank, Query("keyword", word))] == [id_], word


async def test_what_is_not_in_the_index_of_words_yet_is_found_as_well(bank: BankTable) -> None:
    await bank.maintain()
    await bank.write([document("late", "a zebra runs")], replace=False)
    assert shown(await search(bank, Query("keyword", "zebras"))) == ["a zebra runs"]
    assert set(shown(await search(bank, Query("keyword", "run")))) == {"a zebra runs", "she was running home"}


async def test_hybrid_prefers_what_both_halves_find(bank: BankTable) -> None:
    hits = await search(bank, Query("hybrid", "tea", vector("the tea is hot"), max_chunks=100))
    assert len(hits) == 7
    assert hits[0].chunk.text == "the tea is hot"
    assert hits[0].score == pytest.approx(2 / 61)
    assert hits[1].score == pytest.approx(1 / 62)


async def test_a_filter_is_applied_before_the_best_are_chosen(bank: BankTable) -> None:
    for mode in ("vector", "hybrid"):
        query = Query(mode, "tea", vector("the tea is hot"), max_chunks=3, filter=only("run"))
        assert set(shown(await search(bank, query))) == set(TEXTS["run"].split(". ")), mode
    assert await search(bank, Query("keyword", "tea", filter=only("run"))) == []
    assert shown(await search(bank, Query("keyword", "tea", filter=only("tea")))) == ["the tea is hot"]


async def test_answers_keep_to_their_bounds(bank: BankTable) -> None:
    query = Query("vector", vector=vector("the tea is hot"), max_chunks=7)
    hits = await search(bank, query)
    assert await search(bank, replace(query, max_chunks=2)) == hits[:2]
    assert await search(bank, replace(query, score_threshold=hits[3].score)) == hits[:4]
    assert await search(bank, replace(query, score_threshold=1.1)) == []
    tokens = [hit.chunk.tokens for hit in hits]
    assert await search(bank, replace(query, max_tokens=sum(tokens[:3]))) == hits[:3]
    assert await search(bank, replace(query, max_tokens=sum(tokens[:3]) - 1)) == hits[:2]
    assert await search(bank, replace(query, max_tokens=tokens[0] - 1)) == []


async def test_neighbours_come_in_the_order_of_the_document_and_none_twice(bank: BankTable) -> None:
    await bank.write(
        [document("long", ". ".join(f"chunk{at} {'odd' if at in (1, 2, 7) else ''}" for at in range(10)))],
        replace=False,
    )
    query = Query("keyword", "odd", neighbours=1)
    hits = await search(bank, query)
    assert sorted(hit.chunk.position for hit in hits) == [0, 1, 2, 3, 6, 7, 8]
    runs = [hit.chunk.position for hit in hits]
    assert runs.index(6) + 1 == runs.index(7) == runs.index(8) - 1
    assert {hit.score for hit in hits} == {hit.score for hit in await search(bank, replace(query, neighbours=0))}
    whole = await search(bank, replace(query, neighbours=10, max_chunks=1))
    assert [hit.chunk.position for hit in whole] == list(range(10))
    cut = await search(bank, replace(query, neighbours=10, max_chunks=1, max_tokens=4))
    assert [hit.chunk.tokens for hit in whole[:4]] == [1, 2, 2, 1]
    assert cut == whole[:2]
    (alone,) = await search(bank, Query("keyword", "hot"))
    assert [hit.chunk.position for hit in await search(bank, Query("keyword", "hot", neighbours=5))] == [0, 1]
    assert alone.chunk.position == 0


async def test_a_vector_of_other_dimensions_is_refused(bank: BankTable, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"shape \(4,\); allowed: the bank's, \(8,\)"):
        await search(bank, Query("vector", vector=np.ones(4, np.float32)))
    with pytest.raises(BadInput, match="shape None"):
        await search(bank, Query("hybrid", "text"))
    words = await BankTable.create(str(tmp_path / "words"), None, Words())
    with pytest.raises(BadInput, match="the bank has no vectors"):
        await search(words, Query("vector", vector=np.ones(8, np.float32)))


async def test_an_empty_bank_answers_nothing(tmp_path: Path) -> None:
    bank = await BankTable.create(str(tmp_path), DIMENSIONS, Words())
    for mode in ("vector", "keyword", "hybrid"):
        assert await search(bank, Query(mode, "tea", vector("tea"), neighbours=1)) == []
    assert await by_prefix(bank, "", Bounds()) == []


async def test_keys_are_exact_and_prefixes_are_in_order(bank: BankTable) -> None:
    ids = ["a", "a/1", "a/2", "a0", "b", "A", "é", "a\U0010ffff", "a\ud7ff", "a\ue000"]
    await bank.write([document(id_, f"value of {id_}") for id_ in ids], replace=False)

    async def under(prefix: str, max_chunks: int = 100) -> list[str]:
        return [hit.document_id for hit in await by_prefix(bank, prefix, Bounds(max_chunks=max_chunks))]

    assert [hit.document_id for hit in await by_keys(bank, ["b", "a", "none"], Bounds())] == ["a", "b"]
    assert await by_keys(bank, [], Bounds()) == []
    assert await under("a/") == ["a/1", "a/2"]
    assert await under("a") == sorted(id_ for id_ in ids if id_.startswith("a"))
    assert await under("a", 3) == ["a", "a/1", "a/2"]
    assert await under("a\U0010ffff") == ["a\U0010ffff"]
    assert await under("a\ud7ff") == ["a\ud7ff"]
    assert await under("%") == []
    assert [hit.chunk.text for hit in await by_prefix(bank, "", Bounds(max_chunks=2, filter=only("run")))] == TEXTS[
        "run"
    ].split(". ")[:2]


def test_after_a_prefix_comes_the_next_text_that_is_one() -> None:
    assert [after(prefix) for prefix in ("a", "aé", "", "\U0010ffff", "b\U0010ffff", "a\ud7ff")] == [
        "b", "aê", None, None, "c", "a\ue000",
    ]  # fmt: skip


def test_fused_ranks_are_summed_and_the_later_writing_stays() -> None:
    def one(id_: str, position: int = 0, written: int = 1) -> Found:
        about = {"document_id": id_, "position": position, "written": written, "expires_at": NEVER}
        return Found("text", about, 9.0)

    fused = fuse([[one("a"), one("b"), one("c")], [one("c"), one("d")]])
    assert [(found.document_id, found.score) for found in fused] == [
        ("c", pytest.approx(1 / 63 + 1 / 61)),
        ("a", pytest.approx(1 / 61)),
        ("b", pytest.approx(1 / 62)),
        ("d", pytest.approx(1 / 62)),
    ]
    fused = fuse([[one("a", 0, 1), one("a", 1, 1), one("b", 0, 5)], [one("a", 1, 2)]])
    assert [(found.key, found.written) for found in fused] == [(("a", 1), 2), (("b", 0), 5)]
    assert fuse([[], []]) == []
