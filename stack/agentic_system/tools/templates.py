"""A request to a function elsewhere: a `remote_execution`, with a call's arguments in the places that it names.

`{{name}}` stands for the argument of that name, in the path and the parameters of the url, and in the values of params,
headers and body. Arguments are data wherever they come to stand: percent-encoded in the url and the params, as JSON in
the body, and in a header only what a header can hold. A text of the body that is nothing but `{{name}}` becomes the
argument itself, be it a number, a list or an object. An entry whose argument was not given is left out.

`{{key:name}}` in the value of a header stands for a secret of that name, which is none of the arguments and is not in
the agent's config: see stack/agentic_system/tools/keys.py.

Arguments that no template names go along under their own names: in the body of POST and PUT, in the params of GET and
DELETE.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode

from stack.agentic_system.tools.tool import ToolFailed
from stack.api.safety import RestAPIExecutionConfig, RestAPIMethod
from stack.errors import BadInput
from stack.fetcher import Fetcher, refused_header

MAX_URL_CHARACTERS = 8_000
MAX_BODY_BYTES = 2**20
_PLACE = re.compile(r"\{\{\s*([\w.-]{1,200})\s*\}\}")
_KEY = re.compile(r"\{\{\s*key:([\w.-]{1,200})\s*\}\}")
_PLACE_OR_KEY = re.compile(rf"{_KEY.pattern}|{_PLACE.pattern}")
_AUTHORITY = re.compile(r"[a-z]+://[^/?#]*", re.IGNORECASE)
_WITH_BODY = (RestAPIMethod.POST, RestAPIMethod.PUT)


@dataclass(frozen=True)
class Filled:
    """A request as it is sent; `content` is JSON."""

    url: str
    method: str
    headers: dict[str, str]
    content: bytes | None


class _NotGiven(Exception):
    """A template names an argument that the call does not have."""


def require_fillable(execution: RestAPIExecutionConfig, parameters: Collection[str], fetcher: Fetcher) -> None:
    """Raises BadInput for a remote_execution that no call with these parameters could be sent by."""
    named = set(_named(execution))
    if unknown := named - set(parameters):
        listed = ", ".join(sorted(parameters)) or "none, as there are no parameters"
        raise _refused("", f"names the argument {min(unknown)!r}; allowed: {listed}")
    authority, _, _ = _parts(execution.url)
    if _PLACE.search(authority):
        raise _refused("url", "has an argument in its host; allowed: arguments in the path and the parameters")
    if "#" in execution.url:
        raise _refused("url", "has a fragment, which is not sent")
    fetcher.require_askable(_PLACE.sub("x", execution.url))
    for field, values in (("params", execution.params), ("headers", execution.headers)):
        for name, value in (values or {}).items():
            if isinstance(value, dict | list):
                kind = type(value).__name__
                raise _refused(field, f"{name[:100]!r} is a {kind}; allowed: a text, a number or a truth value")
    if any(_KEY.search(text) for text in _texts([execution.url, execution.params, execution.body])):
        raise _refused("", "has a {{key:…}} outside of its headers; allowed: in the values of headers")
    headers = {name: _PLACE_OR_KEY.sub("x", _text(value)) for name, value in (execution.headers or {}).items()}
    if (refused := refused_header(headers)) is not None:
        raise _refused("headers", f"the header {refused[:100]!r} cannot be sent")
    if execution.method is RestAPIMethod.GET and execution.body is not None:
        raise _refused("body", "cannot be sent with GET; allowed: POST, PUT, DELETE")
    own = execution.body if execution.method in _WITH_BODY else execution.params
    for name in parameters:
        if name not in named and name in (own or {}):
            raise _refused("", f"sets {name!r} itself, which is a parameter; allowed: a template, {{{{{name}}}}}")


def fill(
    execution: RestAPIExecutionConfig, arguments: Mapping[str, Any], key_of: Callable[[str], str] | None = None
) -> Filled:
    """The request of a call; `key_of` gives the secret of a name.

    Raises ToolFailed for arguments that cannot stand where the templates put them, and for a secret that is not there.
    """
    named = set(_named(execution))
    unnamed = {name: value for name, value in arguments.items() if name not in named}
    params = _filled_texts(execution.params or {}, arguments)
    headers = _filled_texts(execution.headers or {}, arguments, key_of)
    if (refused := refused_header(headers)) is not None:
        raise ToolFailed(f"an argument or a key holds characters that the header {refused!r} cannot hold")
    body = _filled_body(execution.body, arguments) if execution.body is not None else None
    if execution.method in _WITH_BODY:
        body = {**(body or {}), **unnamed}
    else:
        params |= {name: _text(value) for name, value in unnamed.items() if value is not None}
    url = _filled_url(execution.url, params, arguments)
    return Filled(url, execution.method.value, headers, None if body is None else _as_json(body))


def _named(value: RestAPIExecutionConfig) -> Iterator[str]:
    """The arguments that templates name."""
    for text in _texts([value.url, value.params, value.headers, value.body]):
        yield from _PLACE.findall(text)


def _texts(value: Any) -> Iterator[str]:
    """The texts among values."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


def _parts(url: str) -> tuple[str, str, str]:
    """The scheme and host, the path, and what follows it."""
    authority = match[0] if (match := _AUTHORITY.match(url)) else ""
    path, separator, query = url[len(authority) :].partition("?")
    return authority, path, separator + query


def _filled_url(url: str, params: Mapping[str, str], arguments: Mapping[str, Any]) -> str:
    authority, path, query = _parts(url)
    try:
        path = "/".join(_filled_segment(segment, arguments) for segment in path.split("/"))
        query = _PLACE.sub(lambda place: _encoded(_argument(place, arguments)), query)
        more = urlencode(params)
    except _NotGiven as error:
        raise ToolFailed(f"the argument {error} is needed") from error
    except UnicodeEncodeError as error:
        raise ToolFailed("an argument holds half of a character") from error
    filled = authority + path + query + (f"{'&' if query else '?'}{more}" if more else "")
    if len(filled) > MAX_URL_CHARACTERS:
        raise ToolFailed(f"the arguments are too long for an address; it has at most {MAX_URL_CHARACTERS} characters")
    return filled


def _filled_segment(segment: str, arguments: Mapping[str, Any]) -> str:
    """A part of the path, which no argument can make another path of.

    What stands between slashes is what a template wrote there: no empty part, and none that leads upwards, also where
    the far side decodes it once more.
    """
    if not _PLACE.search(segment):
        return segment
    decoded = _PLACE.sub(lambda place: _text(_argument(place, arguments)), segment)
    parts = [part.strip() for text in (decoded, unquote(decoded)) for part in re.split(r"[/\\]", text)]
    if not decoded.strip() or "." in parts or ".." in parts:
        raise ToolFailed(f"{decoded[:100]!r} cannot be a part of a path")
    return _PLACE.sub(lambda place: _encoded(_argument(place, arguments)), segment)


def _filled_texts(
    values: Mapping[str, Any], arguments: Mapping[str, Any], key_of: Callable[[str], str] | None = None
) -> dict[str, str]:
    def filled(place: re.Match[str]) -> str:
        # In one go: what an argument says is no template.
        name = _KEY.fullmatch(place[0])
        if name is None:
            return _text(_argument(place, arguments, 2))
        return key_of(name[1]) if key_of is not None else place[0]

    texts = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            texts[name] = _PLACE_OR_KEY.sub(filled, _text(value))
        except _NotGiven:
            continue
    return texts


def _filled_body(value: Any, arguments: Mapping[str, Any]) -> Any:
    """A value of the body. Raises _NotGiven for a text that names an argument that was not given."""
    if isinstance(value, dict):
        return dict(_filled_entries(value.items(), arguments))
    if isinstance(value, list):
        return [one for _, one in _filled_entries(((None, one) for one in value), arguments)]
    if not isinstance(value, str):
        return value
    if (whole := _PLACE.fullmatch(value)) is not None:
        if whole[1] not in arguments:
            raise _NotGiven(repr(whole[1]))
        return arguments[whole[1]]
    return _PLACE.sub(lambda place: _text(_argument(place, arguments)), value)


def _filled_entries(entries: Iterable[tuple[Any, Any]], arguments: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for name, value in entries:
        try:
            yield name, _filled_body(value, arguments)
        except _NotGiven:
            continue


def _argument(place: re.Match[str], arguments: Mapping[str, Any], group: int = 1) -> Any:
    """The argument for a place within a text, where null is nothing."""
    value = arguments.get(place[group])
    if value is None:
        raise _NotGiven(repr(place[group]))
    return value


def _encoded(value: Any) -> str:
    return quote(_text(value), safe="")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_json(value: Any) -> bytes:
    try:
        content = json.dumps(value, allow_nan=False).encode()
    except ValueError as error:
        raise ToolFailed("an argument is NaN or infinite, which JSON cannot say") from error
    if len(content) > MAX_BODY_BYTES:
        raise ToolFailed(f"the arguments have {len(content)} bytes; allowed: {MAX_BODY_BYTES}")
    return content


def _refused(field: str, reason: str) -> BadInput:
    return BadInput(f"remote_execution{field and f'.{field}'} {reason}", param="tools")
