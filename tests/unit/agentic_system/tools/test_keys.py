import pytest

from stack.agentic_system.tools.keys import BING, BRAVE, PHOTOGEN, WOLFRAM_ALPHA, find, key_of, keys_of_request
from stack.agentic_system.tools.tool import ToolFailed
from stack.errors import BadInput
from tests.unit.agentic_system.tools.elsewhere import call


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRAVE_SEARCH_KEY", "BING_SEARCH_KEY", "WOLFRAM_ALPHA_KEY", "PHOTOGEN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("header", [None, "", "{}", '{"another_key": "x"}', '{"another": {}}'])
def test_a_request_may_bring_none(header: str | None) -> None:
    assert keys_of_request(header) == {}


def test_a_requests_keys_come_before_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAVE_SEARCH_KEY", "operator's")
    monkeypatch.setenv("WOLFRAM_ALPHA_KEY", "operator's")
    monkeypatch.setenv("BING_SEARCH_KEY", "")
    keys = keys_of_request('{"brave_search_api_key": "request\'s", "photogen_api_key": "p", "other": 1}')
    assert keys == {"brave_search_api_key": "request's", "photogen_api_key": "p"}
    asking = call(keys, query="ray")
    assert key_of(asking, BRAVE) == "request's"
    assert key_of(asking, WOLFRAM_ALPHA) == "operator's"
    assert find(asking, PHOTOGEN) == "p"
    assert find(asking, BING) is None
    with pytest.raises(ToolFailed, match="allowed: bing_search_api_key in the header X-LlamaStack-ProviderData, or"):
        key_of(asking, BING)
    assert "request's" not in repr(asking)


@pytest.mark.parametrize(
    "header",
    [
        "hunter2",
        "[]",
        '"hunter2"',
        '{"brave_search_api_key": 2}',
        '{"brave_search_api_key": ""}',
        '{"brave_search_api_key": "hunter2\\r\\nX-Evil: 1"}',
        '{"brave_search_api_key": "hünter2"}',
        '{"a": "' + "x" * 20_000 + '"}',
        "[" * 10_000,
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(header: str) -> None:
    with pytest.raises(BadInput, match="X-LlamaStack-ProviderData") as caught:
        keys_of_request(header)
    assert "nter2" not in caught.value.message
