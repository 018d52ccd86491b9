"""Questions about documents: passages, and quotes that must be where they are said to be."""

import json

import pytest

from stack.api.schemas import check_schema
from stack.prompt_rows import Text
from stack.question_pairs import RESPONSE_FORMAT, Dropped, Pair, Passage, pair, passages, question

RHINE, LOIRE = "The Rhine rises in Switzerland. It is 1,230 km long.", "The Loire is the longest river of France."
TEXT = f"{RHINE}\n\n{LOIRE} It ends at Nantes."


def answer(**said: object) -> str:
    return json.dumps({"question": "How long is the Rhine?", "answer": "1,230 km"} | said)


def test_a_quote_has_its_place_in_the_document() -> None:
    first, second = passages(Text("rhine", TEXT), 70)
    found = pair(answer(quote="The Loire is the longest river of France."), second)
    assert isinstance(found, Pair)
    assert TEXT[found.start : found.end] == found.quote == "The Loire is the longest river of France."
    assert pair(answer(quote=found.quote), first) == Dropped("ungrounded", answer(quote=found.quote))


@pytest.mark.parametrize(
    ("text", "quote", "found"),
    [
        ("Zürich lies\non the  Limmat.", "Zürich lies on the Limmat.", "Zürich lies\non the  Limmat."),
        ("One line of the text.", " One line\nof the text. ", "One line of the text."),
        ("What (is it) worth? 5 $.", "What (is it) worth? 5 $.", "What (is it) worth? 5 $."),
    ],
)
def test_a_quote_may_break_its_lines_elsewhere_and_stands_as_the_document_has_it(
    text: str, quote: str, found: str
) -> None:
    whole = f"Before. {text} Behind."
    made = pair(answer(quote=quote), Passage(whole, 0))
    assert isinstance(made, Pair)
    assert whole[made.start : made.end] == made.quote == found


@pytest.mark.parametrize(
    ("quote", "reason"),
    [
        ("It is 1,231 km long.", "ungrounded"),
        ("it is 1,230 km long.", "ungrounded"),
        ("It is", "ungrounded"),
        ("", "unreadable"),
        (5, "unreadable"),
        (None, "unreadable"),
    ],
)
def test_what_the_document_does_not_say_is_dropped(quote: object, reason: str) -> None:
    told = answer(quote=quote)
    assert pair(told, Passage(TEXT, 0)) == Dropped(reason, told)


@pytest.mark.parametrize(
    "told",
    [
        "",
        "nonsense",
        "[]",
        "[" * 5_000,
        '{"question": "\\ud800", "answer": "a", "quote": "b"}',
        '{"question": "a"}',
        '{"question": "a", "answer": " ", "quote": "b"}',
    ],
)
def test_an_answer_of_another_shape_is_unreadable(told: str) -> None:
    assert pair(told, Passage(TEXT, 0)) == Dropped("unreadable", told)


def test_passages_are_the_whole_text_and_end_where_a_part_of_it_does() -> None:
    found = list(passages(Text("rhine", TEXT), 70))
    assert "".join(one.text for one in found) == TEXT
    assert found[0].text.endswith("long.\n\n")
    assert all(TEXT[one.start : one.start + len(one.text)] == one.text for one in found)
    assert [(one.id, one.number) for one in found] == [("rhine", number) for number in range(len(found))]
    assert [one.text for one in passages(Text("rhine", TEXT), 10_000)] == [TEXT]


@pytest.mark.parametrize("most", [200, 333, 1_000])
def test_passages_are_bounded_and_nothing_is_lost(most: int) -> None:
    text = "word " * 500 + "x" * 1_500 + "\n\n" + "Sentence one. " * 50
    found = list(passages(Text("a", text), most))
    assert "".join(one.text for one in found) == text
    assert max(len(one.text) for one in found) <= most


def test_blank_passages_are_left_out() -> None:
    assert list(passages(Text("a", "  \n "), 200)) == []


def test_the_model_sees_the_passage_and_is_bound_to_the_shape() -> None:
    assert TEXT in question(Passage(TEXT, 0))
    schema = RESPONSE_FORMAT["json_schema"]["schema"]
    assert check_schema(schema) == schema
    assert schema["required"] == ["question", "answer", "quote"]
