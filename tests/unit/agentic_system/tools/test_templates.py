"""Arguments in the places that templates name: whatever they are, they stay data."""

import json
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack.agentic_system.tools import asking
from stack.agentic_system.tools.templates import MAX_BODY_BYTES, fill, require_fillable
from stack.agentic_system.tools.tool import ToolFailed
from stack.api.safety import RestAPIExecutionConfig
from stack.errors import BadInput

URL = "https://api.example.org/v1"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def execution(url: str = URL, method: str = "POST", **more: Any) -> RestAPIExecutionConfig:
    return RestAPIExecutionConfig.model_validate({"url": url, "method": method} | more)


@given(texts, texts)
def test_an_argument_is_one_part_of_the_path_and_one_parameter_or_is_refused(part: str, parameter: str) -> None:
    there = execution(f"{URL}/users/{{{{part}}}}/posts?by={{{{parameter}}}}&order=new", "GET", params={"p": "{{part}}"})
    try:
        filled = fill(there, {"part": part, "parameter": parameter})
    except ToolFailed:
        assert not part.strip() or "." in unquote(part)
        return
    parts = urlsplit(filled.url)
    assert (parts.scheme, parts.netloc, parts.fragment) == ("https", "api.example.org", "")
    assert filled.url.isascii()
    assert filled.url.isprintable()
    assert " " not in filled.url
    segments = parts.path.split("/")
    assert [*segments[:3], *segments[4:]] == ["", "v1", "users", "posts"]
    assert unquote(segments[3]) == part
    assert segments[3] not in ("", ".", "..")
    assert parse_qs(parts.query, keep_blank_values=True, strict_parsing=True) == {
        "by": [parameter],
        "order": ["new"],
        "p": [part],
    }


@pytest.mark.parametrize(
    "part", ["", " ", ".", "..", "../admin", "a/../b", "..\\b", "%2e%2e", "%2e%2e%2fadmin", "a/./b", ".. "]
)
def test_a_path_is_not_left(part: str) -> None:
    with pytest.raises(ToolFailed, match="cannot be a part of a path"):
        fill(execution(f"{URL}/users/{{{{id}}}}", "DELETE"), {"id": part})


@given(json_values, texts)
def test_an_argument_in_the_body_is_itself_where_it_stands_alone_and_text_within_text(value: Any, text: str) -> None:
    body = {"whole": "{{value}}", "deep": [{"x": "{{ value }}"}, 1], "within": "<{{text}}>", "not": "{value} {{ {{}}"}
    filled = fill(execution(body=body), {"value": value, "text": text})
    assert filled.content is not None
    expected = {"whole": value, "deep": [{"x": value}, 1], "within": f"<{text}>", "not": "{value} {{ {{}}"}
    assert json.loads(filled.content) == expected


@given(texts)
def test_a_header_holds_what_it_can_or_the_call_is_refused(value: str) -> None:
    there = execution(method="GET", headers={"X-City": "city={{city}}"})
    if value.isascii() and value.isprintable():
        assert fill(there, {"city": value}).headers == {"X-City": f"city={value}"}
    else:
        with pytest.raises(ToolFailed, match="the header 'X-City' cannot hold"):
            fill(there, {"city": value})


@given(texts)
def test_what_looks_like_a_template_in_an_argument_is_text(value: str) -> None:
    argument = f"{{{{secret}}}}{value}"
    there = execution(f"{URL}?a={{{{a}}}}", body={"a": "{{a}}", "b": "-{{a}}-"}, headers={"X-S": "{{secret}}"})
    filled = fill(there, {"a": argument, "secret": "hunter2"})
    assert json.loads(filled.content or b"") == {"a": argument, "b": f"-{argument}-"}
    assert parse_qs(urlsplit(filled.url).query)["a"] == [argument]
    assert "hunter2" not in filled.url


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (2.5, "2.5"), (True, "true"), ([1, "ä"], '[1, "ä"]'), ("1", "1")]
)
def test_what_is_no_text_is_written_as_json_within_text(value: Any, text: str) -> None:
    filled = fill(execution(f"{URL}/{{{{v}}}}", "GET", params={"q": "{{v}}"}), {"v": value})
    parts = urlsplit(filled.url)
    assert unquote(parts.path) == f"/v1/{text}"
    assert parse_qs(parts.query)["q"] == [text]


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_arguments_that_no_template_names_go_along_in_the_body(method: str) -> None:
    filled = fill(execution(method=method, params={"lang": "en"}, body={"fixed": 1}), {"city": "Bonn", "days": [1]})
    assert (filled.method, filled.url) == (method, f"{URL}?lang=en")
    assert json.loads(filled.content or b"") == {"fixed": 1, "city": "Bonn", "days": [1]}


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_or_in_the_parameters(method: str) -> None:
    filled = fill(execution(method=method, params={"lang": "en"}), {"city": "Bonn & Köln", "days": None, "at": [1]})
    assert filled.content is None
    assert parse_qs(urlsplit(filled.url).query) == {"lang": ["en"], "city": ["Bonn & Köln"], "at": ["[1]"]}


def test_an_entry_whose_argument_was_not_given_is_left_out() -> None:
    there = execution(
        params={"p": "{{a}}", "q": 1, "none": None},
        headers={"X-A": "{{a}}"},
        body={"a": "{{a}}", "b": {"c": "x{{a}}"}, "d": ["{{a}}", 2], "e": "{{b}}"},
    )
    filled = fill(there, {"b": None})
    assert (filled.url, filled.headers) == (f"{URL}?q=1", {})
    assert json.loads(filled.content or b"") == {"b": {}, "d": [2], "e": None}


@pytest.mark.parametrize("url", [f"{URL}/{{{{a}}}}", f"{URL}?x={{{{a}}}}"])
def test_the_url_needs_its_arguments(url: str) -> None:
    with pytest.raises(ToolFailed, match="the argument 'a' is needed"):
        fill(execution(url), {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"a": float("nan")}, "NaN"),
        ({"a": float("inf")}, "infinite"),
        ({"a": "x" * MAX_BODY_BYTES}, "bytes; allowed"),
        ({"u": "x" * 10_000}, "too long for an address"),
        ({"u": "\ud800"}, "half of a character"),
    ],
)
def test_arguments_that_cannot_be_sent_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ToolFailed, match=words):
        fill(execution(f"{URL}?u={{{{u}}}}"), {"u": ""} | arguments)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"url": "https://{{a}}/"}, "has an argument in its host"),
        ({"url": "https://{{a}}.example.org/x"}, "has an argument in its host"),
        ({"url": "https://example.org:{{a}}/"}, "has an argument in its host"),
        ({"url": "https://{{a}}@example.org/"}, "has an argument in its host"),
        ({"url": "https://{{a}}?b"}, "has an argument in its host"),
        ({"url": "http://example.org/{{a}}"}, "allowed: https"),
        ({"url": "file:///etc/{{a}}"}, "allowed: https"),
        ({"url": "data:text/plain,{{a}}"}, "allowed: https"),
        ({"url": "https://example.org:8080/"}, "port 8080"),
        ({"url": "https://user:pw@example.org/"}, "user name"),
        ({"url": "https://example.org/a b"}, "percent-encoded"),
        ({"url": "https://example.org/#{{a}}"}, "fragment"),
        ({"params": {"x": "{{b}}"}}, "names the argument 'b'; allowed: a"),
        ({"body": {"x": [{"y": "{{b}}"}]}}, "names the argument 'b'"),
        ({"headers": {"Host": "inside"}}, "the header 'Host'"),
        ({"headers": {"X-A": "b\r\nX-C: {{a}}"}}, "the header 'X-A'"),
        ({"headers": {"X-A": ["{{a}}"]}}, "'X-A' is a list"),
        ({"params": {"x": {"y": 1}}}, "'x' is a dict"),
        ({"method": "GET", "body": {}}, "cannot be sent with GET"),
        ({"body": {"a": 1}}, "sets 'a' itself"),
        ({"method": "GET", "params": {"a": 1}}, "sets 'a' itself"),
    ],
)
def test_what_no_call_could_be_sent_by_is_refused_at_once(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        require_fillable(execution(**config), ["a"], asking.FETCHER)
    assert "pw" not in caught.value.message


def test_what_can_be_sent_is_not() -> None:
    there = execution(
        f"{URL}/{{{{a}}}}?b={{{{b}}}}", headers={"Accept": "text/plain", "X-A": "{{a}}"}, body={"a": "{{a}}", "c": 1}
    )
    require_fillable(there, ["a", "b"], asking.FETCHER)
