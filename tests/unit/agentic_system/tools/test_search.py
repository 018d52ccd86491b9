"""Searches against servers that speak Brave's and Bing's formats, as their documentation has them."""

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from stack.agentic_system.tools import search
from stack.agentic_system.tools.search import Search
from stack.agentic_system.tools.tool import MAX_CHARACTERS, ToolFailed
from tests.unit.agentic_system.tools.elsewhere import Elsewhere, call, says
from tests.unit.test_fetcher import Answer, sends, without_end

BRAVE: dict[str, Any] = {
    "type": "search",
    "query": {"original": "ray", "more_results_available": True, "is_navigational": False},
    "mixed": {"type": "mixed", "main": [{"type": "web", "index": 0, "all": False}], "top": [], "side": []},
    "web": {
        "type": "search",
        "family_friendly": True,
        "results": [
            {
                "title": "Ray &amp; friends",
                "url": "https://ray.io/",
                "is_source_local": False,
                "description": "Scale&#x27;s easy.",
                "page_age": "2026-01-01T00:00:00",
                "profile": {"name": "Ray", "url": "https://ray.io", "long_name": "ray.io", "img": "https://…"},
                "language": "en",
                "type": "search_result",
                "subtype": "generic",
                "extra_snippets": ["Tasks.", "Actors."],
            },
            {"title": "Docs", "url": "https://docs.ray.io/", "description": "How to."},
        ],
    },
}
BING: dict[str, Any] = {
    "_type": "SearchResponse",
    "queryContext": {"originalQuery": "ray"},
    "webPages": {
        "webSearchUrl": "https://www.bing.com/search?q=ray",
        "totalEstimatedMatches": 2,
        "value": [
            {
                "id": "https://api.bing.microsoft.com/api/v7/#WebPages.0",
                "name": "Ray",
                "url": "https://ray.io/",
                "isFamilyFriendly": True,
                "displayUrl": "https://ray.io",
                "snippet": "Scale is easy.",
                "dateLastCrawled": "2026-01-01T00:00:00.0000000Z",
                "language": "en",
                "isNavigational": False,
            }
        ],
    },
    "rankingResponse": {"mainline": {"items": []}},
}
KEYS = {"brave_search_api_key": "brave-key", "bing_search_api_key": "bing-key"}


@pytest.fixture
def at(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both APIs at a server that answers so; gives what it is asked."""

    def start(answer: Answer) -> Any:
        url, asked = elsewhere(answer)
        monkeypatch.setattr(search, "BRAVE_URL", f"{url}/res/v1/web/search")
        monkeypatch.setattr(search, "BING_URL", f"{url}/v7.0/search")
        return asked

    return start


async def test_brave_is_asked_as_documented_and_its_results_are_given(at: Any) -> None:
    asked = at(says(**BRAVE))
    output = await Search("brave").run(call(KEYS, query="what is\nray & co?"))
    assert json.loads(output.content) == {
        "query": "what is ray & co?",
        "top_k": [
            {"title": "Ray & friends", "url": "https://ray.io/", "description": "Scale's easy. … Tasks. … Actors."},
            {"title": "Docs", "url": "https://docs.ray.io/", "description": "How to."},
        ],
    }
    (one,) = asked
    url = urlsplit(one.path)
    assert (one.method, url.path) == ("GET", "/res/v1/web/search")
    assert parse_qs(url.query)["q"] == ["what is ray & co?"]
    assert one.headers["X-Subscription-Token"] == "brave-key"
    assert one.headers["Accept"] == "application/json"
    assert "bing-key" not in str(one)


async def test_bing_is_asked_as_documented_and_its_results_are_given(at: Any) -> None:
    asked = at(says(**BING))
    output = await Search("bing").run(call(KEYS, query="ray"))
    assert json.loads(output.content) == {
        "query": "ray",
        "top_k": [{"title": "Ray", "url": "https://ray.io/", "description": "Scale is easy."}],
    }
    (one,) = asked
    url = urlsplit(one.path)
    assert (one.method, url.path) == ("GET", "/v7.0/search")
    assert parse_qs(url.query)["q"] == ["ray"]
    assert one.headers["Ocp-Apim-Subscription-Key"] == "bing-key"
    assert "brave-key" not in str(one)


@pytest.mark.parametrize("engine", ["brave", "bing"])
async def test_without_a_key_nothing_is_asked(at: Any, engine: Any) -> None:
    asked = at(says(**BRAVE))
    with pytest.raises(ToolFailed, match=f"no key for it; allowed: {engine}_search_api_key in the header"):
        await Search(engine).run(call({}, query="ray"))
    assert asked == []


@pytest.mark.parametrize("answer", [{}, {"web": {"results": []}}, {"web": None}, {"web": {"results": "none"}}])
async def test_no_results_are_an_answer(at: Any, answer: dict[str, Any]) -> None:
    at(says(**answer))
    assert json.loads((await Search("brave").run(call(KEYS, query="ray"))).content) == {"query": "ray", "top_k": []}


async def test_results_that_are_not_as_documented_are_left_out(at: Any) -> None:
    results = [None, 1, {"title": "no address"}, {"url": 3}, {"url": "https://a/", "title": [], "description": {}}]
    at(says(web={"results": [*results, {"url": "https://b/" + "x" * 2_000}]}))
    output = json.loads((await Search("brave").run(call(KEYS, query="ray"))).content)
    assert output["top_k"] == [{"title": "", "url": "https://a/", "description": ""}]


async def test_long_results_are_cut_and_only_whole_ones_are_given(at: Any) -> None:
    one = {"title": "t" * 10_000, "url": "https://a/", "description": '"' * 10_000, "extra_snippets": ["x" * 9_999]}
    at(says(web={"results": [one] * 20}))
    content = (await Search("brave").run(call(KEYS, query="ray"))).content
    assert len(content) <= MAX_CHARACTERS
    results = json.loads(content)["top_k"]
    assert 1 < len(results) <= 10
    assert {len(result["description"]) for result in results} == {2_000}


async def test_what_cannot_be_kept_of_a_result_is_replaced(at: Any) -> None:
    content = b'{"web": {"results": [{"url": "https://a/", "title": "a\\u0000b\\ud800", "description": "&#0;"}]}}'
    at(sends(content=content, Content_Type="application/json"))
    output = (await Search("brave").run(call(KEYS, query="ray"))).content
    assert "\0" not in output
    output.encode()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(401, error={"detail": "brave-key is no key"}), "brave refuses the key"),
        (says(403), "brave refuses the key"),
        (says(429), "brave answers no more requests for now"),
        (says(422), "the status 422"),
        (says(500), "the status 500"),
        (sends(302, b"", Location="https://elsewhere.org/"), "redirects are not followed"),
        (sends(content=b"<html>"), "not answer with JSON"),
        (sends(content=b"[" * 100_000), "not answer with JSON"),
        (sends(content=b"[]"), "not answer with a JSON object"),
        (without_end, "more than 1048576 bytes"),
    ],
)
async def test_what_fails_is_told_without_the_key(at: Any, answer: Answer, words: str) -> None:
    at(answer)
    with pytest.raises(ToolFailed) as caught:
        await Search("brave").run(call(KEYS, query="ray"))
    assert words in caught.value.message
    assert "brave-key" not in caught.value.message


async def test_a_query_is_cut_to_what_the_engines_take(at: Any) -> None:
    asked = at(says(**BRAVE))
    await Search("brave").run(call(KEYS, query="word " * 100))
    await Search("brave").run(call(KEYS, query="x" * 1_000))
    words, letters = (parse_qs(urlsplit(one.path).query)["q"][0] for one in asked)
    assert len(words.split()) == 50
    assert len(letters) == 400


@pytest.mark.parametrize(("query", "words"), [(" \n", "the query is empty"), ("\ud800", "half of a character")])
async def test_a_query_that_cannot_be_asked_fails(at: Any, query: str, words: str) -> None:
    asked = at(says(**BRAVE))
    with pytest.raises(ToolFailed, match=words):
        await Search("brave").run(call(KEYS, query=query))
    assert asked == []


def test_it_is_the_tool_that_llama_knows() -> None:
    tool = Search("bing")
    assert tool.name == tool.definition().name == "brave_search"
    assert tool.is_idempotent
