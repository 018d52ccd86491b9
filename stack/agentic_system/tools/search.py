"""Searches of the web by Brave's and Bing's APIs.

Brave (https://api-dashboard.search.brave.com/app/documentation/web-search):
    GET /res/v1/web/search?q=…&count=…   X-Subscription-Token: KEY   {"web": {"results": [{"title", "url",
    "description", "extra_snippets"}]}}
Bing (https://learn.microsoft.com/en-us/bing/search-apis/bing-web-search/reference):
    GET /v7.0/search?q=…&count=…         Ocp-Apim-Subscription-Key: KEY   {"webPages": {"value": [{"name", "url",
    "snippet"}]}}

The model is given {"query": …, "top_k": [{"title", "url", "description"}]}, as Llama 3 knows it. What pages say of
themselves is data in a JSON text.
"""

import html
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode

from stack.agentic_system.tools import asking, keys
from stack.agentic_system.tools.answers import fitting, plain, read_json
from stack.agentic_system.tools.templates import Filled
from stack.agentic_system.tools.tool import Call, Output, Stateless, ToolFailed
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats import builtin_tool

Engine = Literal["brave", "bing"]

NAME = "brave_search"
BRAVE_URL = "https://api.search.brave.com/res/v1/web/search"
BING_URL = "https://api.bing.microsoft.com/v7.0/search"
RESULTS = 10
# Brave takes at most so many characters and words, and Bing a url of 2,048 characters.
MAX_QUERY_CHARACTERS = 400
MAX_QUERY_WORDS = 50
# Of one result, so that a long one does not take the others' room.
MAX_TITLE_CHARACTERS = 300
MAX_URL_CHARACTERS = 1_000
MAX_DESCRIPTION_CHARACTERS = 2_000


@dataclass(frozen=True)
class Search(Stateless):
    """Implements stack.agentic_system.tools.tool.Tool."""

    engine: Engine
    name: str = NAME
    is_idempotent: bool = True

    def definition(self) -> Definition:
        return builtin_tool(NAME)

    async def run(self, call: Call) -> Output:
        query = " ".join(str(call.arguments["query"]).split()[:MAX_QUERY_WORDS])[:MAX_QUERY_CHARACTERS]
        if not query:
            raise ToolFailed("the query is empty")
        answer = await asking.ask(asking.FETCHER, _request(self.engine, query, call))
        return Output(fitting({"query": query}, "top_k", _results(self.engine, read_json(answer, self.engine))))


def _request(engine: Engine, query: str, call: Call) -> Filled:
    params: dict[str, Any] = {"q": query, "count": RESULTS}
    if engine == "brave":
        url, header, name = BRAVE_URL, "X-Subscription-Token", keys.BRAVE
        params |= {"text_decorations": "false", "result_filter": "web"}
    else:
        url, header, name = BING_URL, "Ocp-Apim-Subscription-Key", keys.BING
        params |= {"textFormat": "Raw", "responseFilter": "Webpages"}
    headers = {header: keys.key_of(call, name), "Accept": "application/json"}
    return Filled(f"{url}?{_encoded(params)}", "GET", headers, None)


def _results(engine: Engine, answer: dict[str, Any]) -> list[dict[str, str]]:
    """The results that are as documented; others are left out."""
    outer, inner, title, description = (
        ("web", "results", "title", "description") if engine == "brave" else ("webPages", "value", "name", "snippet")
    )
    found = answer.get(outer)
    entries = found.get(inner) if isinstance(found, dict) else None
    results = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("url"), str):
            snippets = [entry.get(description), *_list(entry.get("extra_snippets"))]
            result = {
                "title": _plain(entry.get(title), MAX_TITLE_CHARACTERS),
                "url": plain(entry["url"]),
                "description": _plain(" … ".join(one for one in snippets if isinstance(one, str)),
                                      MAX_DESCRIPTION_CHARACTERS),
            }  # fmt: skip
            if len(result["url"]) <= MAX_URL_CHARACTERS:
                results.append(result)
    return results[:RESULTS]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(value: Any, limit: int) -> str:
    text = html.unescape(plain(value)) if isinstance(value, str) else ""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _encoded(params: dict[str, Any]) -> str:
    try:
        return urlencode(params)
    except UnicodeEncodeError as error:
        raise ToolFailed("the query holds half of a character") from error
