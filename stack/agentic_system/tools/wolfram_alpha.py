"""Questions to Wolfram|Alpha, by its Full Results API (https://products.wolframalpha.com/api/documentation).

    GET /v2/query?appid=KEY&input=…&output=json&format=plaintext
    {"queryresult": {"success": true, "error": false, "pods": [
        {"title", "primary", "subpods": [{"title", "plaintext"}]}]}}

The model is given the pods' texts: {"input": …, "pods": [{"title", "text"}]}, the primary ones first.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from stack.agentic_system.tools import asking, keys
from stack.agentic_system.tools.answers import fitting, plain, read_json
from stack.agentic_system.tools.templates import Filled
from stack.agentic_system.tools.tool import Call, Output, Stateless, ToolFailed, cut
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats import builtin_tool

NAME = "wolfram_alpha"
URL = "https://api.wolframalpha.com/v2/query"
MAX_INPUT_CHARACTERS = 1_000
MAX_POD_CHARACTERS = 4_000
OF = "Wolfram|Alpha"


@dataclass(frozen=True)
class WolframAlpha(Stateless):
    """Implements stack.agentic_system.tools.tool.Tool."""

    name: str = NAME
    is_idempotent: bool = True

    def definition(self) -> Definition:
        return builtin_tool(NAME)

    async def run(self, call: Call) -> Output:
        question = str(call.arguments["query"]).strip()
        if not 0 < len(question) <= MAX_INPUT_CHARACTERS:
            raise ToolFailed(f"the query has {len(question)} characters; allowed: 1 to {MAX_INPUT_CHARACTERS}")
        params = {
            "appid": keys.key_of(call, keys.WOLFRAM_ALPHA),
            "input": question,
            "output": "json",
            "format": "plaintext",
        }
        try:
            url = f"{URL}?{urlencode(params)}"
        except UnicodeEncodeError as error:
            raise ToolFailed("the query holds half of a character") from error
        answer = read_json(await asking.ask(asking.FETCHER, Filled(url, "GET", {}, None)), OF)
        result = answer.get("queryresult")
        if not isinstance(result, dict):
            raise ToolFailed(f"{OF} does not answer as documented")
        return Output(fitting({"input": question}, "pods", _pods(result)))


def _pods(result: dict[str, Any]) -> list[dict[str, str]]:
    """The pods with a text, the primary ones first. Raises ToolFailed where there is no result."""
    if result.get("error"):
        error = result["error"]
        code = str(error.get("code")) if isinstance(error, dict) else ""
        raise ToolFailed(f"{OF} refuses the key" if code in ("1", "2") else f"{OF} has failed")
    if not result.get("success"):
        raise ToolFailed(f"{OF} does not understand the query{_meant(result)}")
    pods = [pod for pod in _objects(result.get("pods")) if _text(pod)]
    if not pods:
        raise ToolFailed(f"{OF} has no answer in text to the query")
    pods.sort(key=lambda pod: pod.get("primary") is not True)
    return [{"title": cut(_of(pod, "title"), 200), "text": cut(_text(pod), MAX_POD_CHARACTERS)} for pod in pods]


def _text(pod: dict[str, Any]) -> str:
    lines = []
    for subpod in _objects(pod.get("subpods")):
        title, text = _of(subpod, "title"), _of(subpod, "plaintext")
        lines += [f"{title}: {text}" if title else text] if text else []
    return "\n".join(lines)


def _meant(result: dict[str, Any]) -> str:
    """What it takes the query for, if it has an idea: one suggestion, or a list of them."""
    given = result.get("didyoumeans")
    meant = [_of(one, "val") for one in ([given] if isinstance(given, dict) else _objects(given))]
    shown = ", ".join(repr(one[:200]) for one in meant[:5] if one)
    return f"; did you mean: {shown}?" if shown else ""


def _of(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    return plain(text).strip() if isinstance(text, str) else ""


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
