"""Questions to a server that speaks Wolfram|Alpha's format, as its documentation has it."""

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from stack.agentic_system.tools import wolfram_alpha
from stack.agentic_system.tools.tool import MAX_CHARACTERS, ToolFailed
from stack.agentic_system.tools.wolfram_alpha import WolframAlpha
from tests.unit.agentic_system.tools.elsewhere import Elsewhere, call, says
from tests.unit.test_fetcher import Answer, sends

KEYS = {"wolfram_alpha_api_key": "wolfram-key"}


def pod(title: str, *subpods: tuple[str, str], **more: Any) -> dict[str, Any]:
    listed = [{"title": name, "plaintext": text, "img": {"src": "https://…"}} for name, text in subpods]
    return (
        {"title": title, "scanner": "Identity", "id": title, "position": 100, "error": False}
        | {
            "numsubpods": len(listed),
            "subpods": listed,
        }
        | more
    )


FRANCE = {
    "success": True,
    "error": False,
    "numpods": 4,
    "datatypes": "Country",
    "timedout": "",
    "pods": [
        pod("Input interpretation", ("", "France | population")),
        pod("Picture", ("", "")),
        pod("Result", ("", "66.4 million people (2024 estimate)"), primary=True),
        pod("Demographics", ("density", "121 people/km²"), ("growth", "0.2 %/yr")),
    ],
}


@pytest.fixture
def at(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Any:
    def start(answer: Answer) -> Any:
        url, asked = elsewhere(answer)
        monkeypatch.setattr(wolfram_alpha, "URL", f"{url}/v2/query")
        return asked

    return start


async def test_it_is_asked_as_documented_and_its_pods_are_given_the_result_first(at: Any) -> None:
    asked = at(says(queryresult=FRANCE))
    output = await WolframAlpha().run(call(KEYS, query=" population of France & more "))
    assert json.loads(output.content) == {
        "input": "population of France & more",
        "pods": [
            {"title": "Result", "text": "66.4 million people (2024 estimate)"},
            {"title": "Input interpretation", "text": "France | population"},
            {"title": "Demographics", "text": "density: 121 people/km²\ngrowth: 0.2 %/yr"},
        ],
    }
    (one,) = asked
    url = urlsplit(one.path)
    assert (one.method, url.path) == ("GET", "/v2/query")
    assert parse_qs(url.query) == {
        "appid": ["wolfram-key"],
        "input": ["population of France & more"],
        "output": ["json"],
        "format": ["plaintext"],
    }


async def test_without_a_key_nothing_is_asked(at: Any) -> None:
    asked = at(says(queryresult=FRANCE))
    with pytest.raises(ToolFailed, match="no key for it; allowed: wolfram_alpha_api_key in the header"):
        await WolframAlpha().run(call({}, query="pi"))
    assert asked == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(queryresult={"success": False, "error": False}), "does not understand the query"),
        (
            says(queryresult={"success": False, "error": False, "didyoumeans": {"score": "0.4", "val": "pie"}}),
            "did you mean: 'pie'?",
        ),
        (
            says(queryresult={"success": False, "error": False, "didyoumeans": [{"val": "pie"}, {"val": "py"}, 3]}),
            "did you mean: 'pie', 'py'?",
        ),
        (
            says(queryresult={"success": False, "error": {"code": "1", "msg": "Invalid appid wolfram-key"}}),
            "refuses the key",
        ),
        (says(queryresult={"success": False, "error": {"code": "1000", "msg": "wolfram-key"}}), "has failed"),
        (says(queryresult={"success": False, "error": True}), "has failed"),
        (says(queryresult={"success": True, "error": False, "pods": [pod("Picture", ("", ""))]}), "no answer in text"),
        (says(queryresult={"success": True, "error": False, "pods": "none"}), "no answer in text"),
        (says(queryresult=[]), "does not answer as documented"),
        (says(403), "refuses the key"),
        (sends(501, b"No short answer available wolfram-key"), "the status 501"),
        (sends(content=b"<?xml version='1.0'?><queryresult/>"), "not answer with JSON"),
    ],
)
async def test_what_fails_is_told_without_the_key(at: Any, answer: Answer, words: str) -> None:
    at(answer)
    with pytest.raises(ToolFailed) as caught:
        await WolframAlpha().run(call(KEYS, query="pi"))
    assert words in caught.value.message
    assert "wolfram-key" not in caught.value.message


async def test_many_and_long_pods_are_cut_and_only_whole_ones_are_given(at: Any) -> None:
    at(says(queryresult=FRANCE | {"pods": [pod("Digits", ("", "3" * 9_000))] * 20}))
    content = (await WolframAlpha().run(call(KEYS, query="pi"))).content
    assert len(content) <= MAX_CHARACTERS
    pods = json.loads(content)["pods"]
    assert 1 < len(pods) < 20
    assert all("characters are left out" in one["text"] for one in pods)


@pytest.mark.parametrize(
    ("query", "words"), [(" ", "1 to 1000"), ("x" * 2_000, "1 to 1000"), ("\ud800", "half of a character")]
)
async def test_a_query_that_cannot_be_asked_fails(at: Any, query: str, words: str) -> None:
    asked = at(says(queryresult=FRANCE))
    with pytest.raises(ToolFailed, match=words):
        await WolframAlpha().run(call(KEYS, query=query))
    assert asked == []


def test_it_is_the_tool_that_llama_knows() -> None:
    tool = WolframAlpha()
    assert tool.name == tool.definition().name == "wolfram_alpha"
    assert tool.is_idempotent
