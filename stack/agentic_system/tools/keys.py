"""The keys of services that tools ask: the operator's, from the environment, or those of whoever sends the request.

A request brings its own in the header X-LlamaStack-ProviderData, as a JSON object; they come before the operator's.
They are never stored and never logged, and go to the service alone: to the address of a `remote_execution` only those
that its headers name. Of the operator's these are the ones that the config has for that host (`remote_keys`), as
whoever makes an agent may be a stranger.
"""

import os
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from stack.agentic_system.tools.tool import Call, ToolFailed
from stack.agents_config import RemoteKey
from stack.api.safety import RestAPIExecutionConfig

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


def key_of(call: Call, name: str) -> str:
    """The key that a call asks with. Raises ToolFailed where there is none."""
    if key := find(call, name):
        return key
    raise ToolFailed(
        f"there is no key for it; allowed: {name} in the header X-LlamaStack-ProviderData, or {VARIABLES[name]} in the "
        "environment of the stack"
    )


def find(call: Call, name: str) -> str | None:
    """The request's key, or the operator's where the request has none."""
    return call.keys.get(name) or os.environ.get(VARIABLES[name]) or None


def remote(call: Call, execution: RestAPIExecutionConfig, operators: Mapping[str, RemoteKey]) -> Callable[[str], str]:
    """Gives the secrets that a remote_execution's headers name. Raises ToolFailed for one that is not there."""

    def key(name: str) -> str:
        if own := call.keys.get(name):
            return own
        known = operators.get(name)
        is_for_it = known is not None and urlsplit(execution.url).hostname in known.hosts
        if known is not None and is_for_it and (held := os.environ.get(known.variable)):
            return held
        raise ToolFailed(f"there is no key {name!r} for it; allowed: one in the header X-LlamaStack-ProviderData")

    return key
