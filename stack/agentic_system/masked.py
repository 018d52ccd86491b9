"""Agents' configs as they are shown: without what may be secret in the headers of what they ask elsewhere.

Headers can name a secret in the place of it, as {{key:name}}. Who writes one into the config does not see it again.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stack.errors import BadInput

MASK = "********"
_PLAIN = ("accept", "accept-charset", "accept-encoding", "accept-language", "content-type", "user-agent")


def masked(config: Any) -> Any:
    """A config as JSON, in which a mask stands for each value of a header that is no template."""
    if isinstance(config, list):
        return [masked(one) for one in config]
    if not isinstance(config, dict):
        return config
    shown = {name: masked(value) for name, value in config.items()}
    if (headers := _headers(config)) is not None:
        shown["headers"] = {name: value if _is_plain(name, value) else MASK for name, value in headers.items()}
    return shown


def require_unmasked(config: Any, place: str) -> None:
    """Raises BadInput for a config that has a mask in it, as it was shown: the secret itself is not known by it."""
    for name, value in _all_headers(config):
        if value == MASK:
            raise BadInput(
                f"the header {name[:100]!r} is {MASK!r}, which stands for a value that is not shown; allowed: the "
                "value itself, or {{key:name}}",
                param=place,
            )


def _all_headers(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        yield from (_headers(config) or {}).items()
    for one in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _all_headers(one)


def _headers(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of a RestAPIExecutionConfig."""
    headers = config.get("headers")
    return headers if isinstance(headers, dict) and "url" in config and "method" in config else None


def _is_plain(name: str, value: Any) -> bool:
    return name.lower() in _PLAIN or (isinstance(value, str) and "{{" in value)
