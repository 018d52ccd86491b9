"""Answers from elsewhere, read: text, JSON, and as much of either as the model has room for."""

import json
from collections.abc import Sequence
from typing import Any

from stack.agentic_system.tools.tool import MAX_CHARACTERS, ToolFailed
from stack.fetcher import Answer

_TEXTS = ("application/json", "application/xml", "application/yaml", "application/x-yaml", "application/x-ndjson",
          "application/jsonl", "application/javascript")  # fmt: skip
_CHARSETS = ("utf-8", "utf8", "us-ascii", "iso-8859-1", "windows-1252")


def text_of(answer: Answer) -> str:
    """An answer that is text or JSON. Raises ToolFailed for one of another kind."""
    if not answer.content:
        return ""
    kind, *parameters = (part.strip().lower() for part in answer.content_type.split(";"))
    if kind and not kind.startswith("text/") and not kind.endswith(("+json", "+xml")) and kind not in _TEXTS:
        raise ToolFailed(f"the answer is {kind[:100]!r}; allowed: text, JSON")
    charset = next((one.partition("=")[2].strip('" ') for one in parameters if one.startswith("charset=")), "utf-8")
    if charset not in _CHARSETS:
        raise ToolFailed(f"the answer has the charset {charset[:50]!r}; allowed: {', '.join(_CHARSETS)}")
    try:
        return plain(answer.content.decode(charset))
    except UnicodeDecodeError as error:
        raise ToolFailed(f"the answer is no {charset}: {error.reason} at byte {error.start}") from error


def plain(text: str) -> str:
    """A text from elsewhere as it can be kept: without NUL characters and halves of characters."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def read_json(answer: Answer, of: str) -> dict[str, Any]:
    """An API's answer, a JSON object. Raises ToolFailed, without what a refusal says: it may name the key."""
    if answer.status in (401, 403):
        raise ToolFailed(f"{of} refuses the key")
    if answer.status == 429:
        raise ToolFailed(f"{of} answers no more requests for now")
    if answer.status != 200:
        raise ToolFailed(f"{of} answers with the status {answer.status}")
    try:
        read = json.loads(answer.content)
    except (ValueError, RecursionError) as error:
        raise ToolFailed(f"{of} does not answer with JSON") from error
    if not isinstance(read, dict):
        raise ToolFailed(f"{of} does not answer with a JSON object")
    return read


def fitting(head: dict[str, Any], name: str, entries: Sequence[Any]) -> str:
    """A JSON object of `head` and a list, with as many of the list's first entries as there is room for, whole."""
    for count in range(len(entries), -1, -1):
        text = json.dumps({**head, name: entries[:count]}, ensure_ascii=False)
        if len(text) <= MAX_CHARACTERS:
            return text
    raise ToolFailed("the answer is too long")
