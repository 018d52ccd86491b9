import pytest

from stack.agentic_system.tools.keys import BING, BRAVE, PHOTOGEN, WOLFRAM_ALPHA, find, key_of
from stack.agentic_system.tools.tool import ToolFailed
from tests.unit.agentic_system.tools.elsewhere import call


def test_a_requests_keys_come_before_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAVE_SEARCH_KEY", "operator's")
    monkeypatch.setenv("WOLFRAM_ALPHA_KEY", "operator's")
    monkeypatch.setenv("BING_SEARCH_KEY", "")
    asking = call({BRAVE: "request's", PHOTOGEN: "p"}, query="ray")
    assert key_of(asking, BRAVE) == "request's"
    assert key_of(asking, WOLFRAM_ALPHA) == "operator's"
    assert find(asking, PHOTOGEN) == "p"
    assert find(asking, BING) is None
    with pytest.raises(ToolFailed, match="allowed: bing_search_api_key in the header X-LlamaStack-ProviderData, or"):
        key_of(asking, BING)


def test_what_is_shown_of_a_call_does_not_hold_its_keys() -> None:
    assert "hunter2" not in repr(call({BRAVE: "hunter2"}, query="ray"))
