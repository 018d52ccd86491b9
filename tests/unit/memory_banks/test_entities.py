"""What is taken of a model's answer about a text, and which names a query may hold."""

import json
from typing import Any

import pytest

from stack.api.schemas import check_schema
from stack.memory_banks.entities import (
    MAX_ENTITIES,
    MAX_NAME,
    MAX_QUERY_WORDS,
    RESPONSE_FORMAT,
    key_of,
    names_in,
    read_answer,
)
from stack.memory_banks.rows import Chunk, Mention, Relation

TEXT = "Anna Ek founded Zürich Labs in 1999.\nThe party is over; C++ stays."
CHUNK = Chunk(TEXT, 3, 0, len(TEXT), 12, None, ())


def answer(entities: Any, relations: Any = ()) -> str:
    return json.dumps({"entities": entities, "relations": list(relations)})


def entity(name: Any, kind: Any = "thing") -> dict[str, Any]:
    return {"name": name, "type": kind}


def relation(source: Any, label: Any, target: Any) -> dict[str, Any]:
    return {"source": source, "relation": label, "target": target}


def names(told: str, *, is_cut: bool = False) -> list[str]:
    found = read_answer(told, CHUNK, is_cut=is_cut)
    assert found is not None
    return [mention.name for mention in found[0]]


def test_entities_and_relations_have_the_place_of_their_chunk() -> None:
    told = answer(
        [entity("Anna Ek", "person"), entity("Zürich Labs", "firm")], [relation("anna  ek", "founded", "ZÜRICH LABS")]
    )
    assert read_answer(told, CHUNK, is_cut=False) == (
        [Mention("anna ek", "Anna Ek", "person", 3), Mention("zürich labs", "Zürich Labs", "firm", 3)],
        [Relation("anna ek", "zürich labs", "founded", 3)],
    )


@pytest.mark.parametrize(
    "name", ["Bob", "art", "Ann", "Labs in 1998", "", " ", "C+++", 5, None, ["Anna Ek"], "A" * 500]
)
def test_a_name_that_does_not_stand_in_the_text_is_dropped(name: Any) -> None:
    assert names(answer([entity(name), entity("C++")])) == ["C++"]


@pytest.mark.parametrize("other", [entity("1999", ""), entity("1999", 7), {"name": "1999"}, "1999", None, ["1999"]])
def test_an_entry_of_another_shape_is_dropped(other: Any) -> None:
    assert names(answer([other, entity("C++")])) == ["C++"]


def test_a_relation_to_what_is_no_entity_is_dropped() -> None:
    relations = [relation("C++", "is", "party"), relation("C++", "is", "C++"), relation("C++", "", "1999")]
    found = read_answer(answer([entity("C++"), entity("1999")], relations), CHUNK, is_cut=False)
    assert found is not None
    assert found[1] == []


def test_there_are_so_many_entities_at_most() -> None:
    text = " ".join(f"n{number}" for number in range(100))
    chunk = Chunk(text, 0, 0, len(text), 100, None, ())
    found = read_answer(answer([entity(name) for name in text.split()]), chunk, is_cut=False)
    assert found is not None
    assert len(found[0]) == MAX_ENTITIES


@pytest.mark.parametrize(
    "told", ["", "Sure! Anna Ek.", "[]", "7", "[" * 5_000, '{"entities": [', '{"entities": "\\ud800"}']
)
def test_what_is_no_object_of_json_is_no_answer(told: str) -> None:
    assert read_answer(told, CHUNK, is_cut=False) is None


def test_an_answer_that_was_cut_off_counts_as_far_as_it_goes() -> None:
    whole = answer([entity("Anna Ek"), entity("Zürich Labs")])
    assert names(whole[: whole.index("Labs")], is_cut=True) == ["Anna Ek"]
    assert read_answer(whole[: whole.index("Labs")], CHUNK, is_cut=False) is None


@pytest.mark.parametrize(
    ("one", "other"), [("ÉCOLE", "école"), ("Straße", "STRASSE"), ("ｆｕｌｌ  width", "full\nwidth"), ("ﬁn", "FIN")]
)
def test_spellings_of_one_name_have_one_key(one: str, other: str) -> None:
    assert key_of(one) == key_of(other)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("Who is Anna Ek's boss?", "Anna Ek"),
        ("is c++/o'brien there", "O'Brien"),
        ("私は東京に住む", "東京"),
        ("서울에서", "서울"),
        ("नरेन्द्र मोदी कहाँ हैं", "नरेन्द्र मोदी"),
        ("AT&T, then", "at&t"),
    ],
)
def test_a_query_may_hold_a_name(query: str, name: str) -> None:
    assert key_of(name) in names_in(query)


def test_a_part_of_a_word_is_no_name_and_the_names_are_bounded() -> None:
    assert "art" not in names_in("party")
    assert names_in(" \n") == []
    many = names_in("word " * 20_000 + "last")
    assert "last" not in many
    assert len(names_in(" ".join(map(str, range(20_000))))) <= 8 * MAX_QUERY_WORDS
    assert all(len(name) <= MAX_NAME for name in names_in("x" * 20_000 + " y"))


def test_the_schema_is_one_that_the_engine_takes() -> None:
    check_schema(RESPONSE_FORMAT["json_schema"]["schema"])
