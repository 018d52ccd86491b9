"""Wire types refuse what they do not know, and say in words what is allowed."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from stack.api.wire import Id, Request, Wire, at_most, describe, explain


class Inner(Wire):
    size: Annotated[int, Field(ge=1, le=9)] = 1


class Outer(Request):
    name: str
    inner: Inner = Inner()


def refusal(value: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    return describe(caught.value)


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    assert refusal({"name": "a", "nmae": "b"}) == "unknown key 'nmae'; allowed: name, inner"


def test_an_unknown_key_further_down_is_refused_at_its_place() -> None:
    assert refusal({"name": "a", "inner": {"sise": 2}}) == "inner: unknown key 'sise'; allowed: size"


def test_a_body_is_the_same_flat_and_wrapped() -> None:
    flat = {"name": "a", "inner": {"size": 3}}
    assert Outer.model_validate(flat) == Outer.model_validate({"request": flat}) == Outer(name="a", inner=Inner(size=3))


def test_a_wrapped_body_is_checked_like_a_flat_one() -> None:
    assert refusal({"request": {"name": "a", "inner": {"size": 0}}}) == refusal({"name": "a", "inner": {"size": 0}})


def test_only_a_request_may_be_wrapped() -> None:
    with pytest.raises(ValidationError, match="unknown key 'request'; allowed: size"):
        Inner.model_validate({"request": {"size": 1}})


@pytest.mark.parametrize(
    "value",
    [{"request": {"request": {"name": "a"}}}, {"request": {"name": "a"}, "name": "b"}, {"request": "a"}],
    ids=["wrapped twice", "wrapped and flat", "wrapped text"],
)
def test_other_wrappings_are_refused(value: object) -> None:
    assert "unknown key 'request'; allowed: name, inner" in refusal(value)


def test_wire_types_cannot_be_changed() -> None:
    inner = Inner(size=1)
    with pytest.raises(ValidationError, match="frozen"):
        inner.size = 2  # type: ignore[misc]


def test_a_missing_field_is_named() -> None:
    assert refusal({}) == "name: is required"


def test_a_value_out_of_bounds_is_shown_with_its_bound() -> None:
    assert (
        refusal({"name": "a", "inner": {"size": 10}}) == "inner.size: Input should be less than or equal to 9, not 10"
    )


def test_a_long_value_is_cut() -> None:
    words = refusal({"name": ["x" * 10_000]})
    assert words.endswith("...")
    assert len(words) < 200


def test_all_problems_are_told() -> None:
    assert refusal({"inner": {"size": 0}}) == (
        "name: is required; inner.size: Input should be greater than or equal to 1, not 0"
    )


def test_explain_gives_the_place_and_the_description() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"name": "a", "inner": {"size": 0}})
    assert explain(caught.value.errors()[0]) == ("inner.size", "Input should be greater than or equal to 1, not 0")


@pytest.mark.parametrize("value", ["a", "tune-1", "A.b_c-9", "0" * 100])
def test_ids_that_are_safe_as_file_names_are_taken(value: str) -> None:
    assert TypeAdapter(Id).validate_python(value) == value


@pytest.mark.parametrize(
    "value", ["", ".", "..", "-a", "a/b", "a b", "a\n", "a\0", "ä", "../a", "a..b", "a.", "0" * 101]
)
def test_ids_that_are_not_safe_as_file_names_are_refused(value: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Id).validate_python(value)


class Few(Wire):
    listed: Annotated[list[int], at_most(2)] = []
    mapped: Annotated[dict[str, int], at_most(2)] = {}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"listed": [1, 2]}, {"listed": ["x"] * 3}),
        ({"mapped": {"a": 1, "b": 2}}, {"mapped": dict.fromkeys("abc", "x")}),
    ],
    ids=["list", "mapping"],
)
def test_too_many_entries_are_refused_before_any_is_looked_at(right: dict[str, Any], wrong: dict[str, Any]) -> None:
    Few.model_validate(right)
    with pytest.raises(ValidationError) as caught:
        Few.model_validate(wrong)
    (name,) = wrong
    assert describe(caught.value) == f"{name}: has 3 entries; allowed: at most 2"


class Choice(Wire):
    content: str | list[str]
    names: dict[str, int] = {}


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ({"content": 5}, {"content"}),
        ({"content": ["a", 5]}, {"content", "content.1"}),
        ({"content": "a", "names": {"b": "c"}}, {"names.b"}),
    ],
)
def test_places_are_those_of_the_request_and_nothing_else(value: object, places: set[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Choice.model_validate(value)
    assert {explain(error)[0] for error in caught.value.errors()} == places


class Cat(Wire):
    kind: Literal["cat"]


class Dog(Wire):
    kind: Literal["dog"]


class Home(Wire):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


@pytest.mark.parametrize(("kind", "shown"), [("cow", "'cow'"), ("x" * 5_000, "'" + "x" * 76 + "...")], ids=["", "long"])
def test_an_unknown_kind_is_shown_with_the_allowed_ones(kind: str, shown: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Home.model_validate({"pet": {"kind": kind}})
    assert describe(caught.value) == f"pet: 'kind' is {shown}; allowed: 'cat', 'dog'"


class Renamed(Wire):
    schema_: int = Field(alias="schema")


def test_known_keys_are_called_as_they_are_sent() -> None:
    assert Renamed.model_validate({"schema": 1}).schema_ == 1
    with pytest.raises(ValidationError) as caught:
        Renamed.model_validate({"schema_": 1})
    assert describe(caught.value) == "unknown key 'schema_'; allowed: schema"
