"""The secrets that tools ask with: the operator's, from the environment, or those of whoever sends the request.

A request brings its own in the header X-LlamaStack-ProviderData, as a JSON object; they come before the operator's.
They are never stored and never logged.
"""

import json
import os

from stack.agentic_system.tools.tool import Call, ToolFailed
from stack.errors import BadInput

PROVIDER_DATA = "X-LlamaStack-ProviderData"
MAX_HEADER_CHARACTERS = 16_000
BRAVE = "brave_search_api_key"
BING = "bing_search_api_key"
WOLFRAM_ALPHA = "wolfram_alpha_api_key"
PHOTOGEN = "photogen_api_key"
# Where the operator sets them: in the environment of each Ray node.
VARIABLES = {
    BRAVE: "BRAVE_SEARCH_KEY",
    BING: "BING_SEARCH_KEY",
    WOLFRAM_ALPHA: "WOLFRAM_ALPHA_KEY",
    PHOTOGEN: "PHOTOGEN_KEY",
}


def keys_of_request(header: str | None) -> dict[str, str]:
    """The keys in a request's header. Raises BadInput, which does not repeat any of it."""
    if not header:
        return {}
    if len(header) > MAX_HEADER_CHARACTERS:
        raise BadInput(f"{PROVIDER_DATA} has {len(header)} characters; allowed: {MAX_HEADER_CHARACTERS}")
    try:
        given = json.loads(header)
    except (ValueError, RecursionError):
        raise BadInput(f"{PROVIDER_DATA} is not JSON") from None
    if not isinstance(given, dict):
        raise BadInput(f"{PROVIDER_DATA} is no JSON object; allowed: {', '.join(VARIABLES)}")
    keys = {}
    for name in VARIABLES.keys() & given.keys():
        value = given[name]
        if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable():
            raise BadInput(f"{PROVIDER_DATA}: {name} is no key; allowed: a text of printable ASCII characters")
        keys[name] = value
    return keys


def all_keys(of_request: dict[str, str]) -> dict[str, str]:
    """The keys that a turn's calls have: the request's, and the operator's where the request has none."""
    own = {name: os.environ.get(variable, "") for name, variable in VARIABLES.items()}
    return {name: value for name, value in own.items() if value} | of_request


def key_of(call: Call, name: str) -> str:
    """A key. Raises ToolFailed where there is none."""
    if name not in call.keys:
        raise ToolFailed(
            f"there is no key for it; allowed: {name} in the header {PROVIDER_DATA}, or {VARIABLES[name]} "
            "in the environment of the stack"
        )
    return call.keys[name]
