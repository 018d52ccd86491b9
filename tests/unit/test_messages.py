"""Messages: roles, content in parts, bounds."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from stack.api.messages import (
    MAX_CHARACTERS,
    MAX_PARTS,
    Attachment,
    CompletionMessage,
    Message,
    StopReason,
    text_of,
)
from stack.api.wire import describe
from stack.errors import BadInput

MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


def refusal(value: object) -> str:
    with pytest.raises(ValidationError) as caught:
        MESSAGE.validate_python(value)
    return describe(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [("a", "a"), ("", ""), (["a", "b c", ""], "ab c"), ([], "")],
    ids=["text", "no text", "parts", "no parts"],
)
def test_parts_are_put_together_without_anything_between(content: str | list[str], text: str) -> None:
    assert text_of(content) == text


@pytest.mark.parametrize("more", [[], ["a"]], ids=["alone", "with text"])
def test_an_attachment_is_not_lost_where_text_is_needed(more: list[str]) -> None:
    attachment = Attachment(content="b", mime_type="text/plain")
    for content in (attachment, [*more, attachment]):
        with pytest.raises(BadInput, match="an attachment cannot be used here; allowed: text"):
            text_of(content)


@pytest.mark.parametrize(
    "content",
    ["a", ["a", "b"], {"content": "a", "mime_type": "text/plain"}, ["a", {"content": ["b"], "mime_type": "text/csv"}]],
    ids=["text", "texts", "attachment", "list"],
)
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_content_is_written_as_it_was_read(content: Any, role: str) -> None:
    message = MESSAGE.validate_python({"role": role, "content": content})
    assert message.model_dump(mode="json")["content"] == content
    assert MESSAGE.validate_json(message.model_dump_json()) == message


def test_the_role_tells_the_kind_of_message() -> None:
    message = MESSAGE.validate_python({"role": "assistant", "content": "Paris"})
    assert message == CompletionMessage(content="Paris", stop_reason=StopReason.end_of_turn, tool_calls=[])


def test_an_unknown_role_is_refused_with_the_known_ones() -> None:
    words = refusal({"role": "robot", "content": "a"})
    assert all(role in words for role in ("'robot'", "'user'", "'system'", "'ipython'", "'assistant'"))


def test_a_tool_may_be_one_of_the_stack_or_any_other() -> None:
    names = ["brave_search", "my_tool"]
    calls = [{"call_id": "1", "tool_name": name, "arguments": {}} for name in names]
    message = MESSAGE.validate_python({"role": "assistant", "content": "", "tool_calls": calls})
    assert isinstance(message, CompletionMessage)
    assert [str(call.tool_name) for call in message.tool_calls] == names


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, "content: is required"),
        ({"role": "user", "content": 5}, "not 5"),
        ({"role": "user", "content": [5]}, "not 5"),
        (
            {"role": "user", "content": {"image": {"uri": "http://10.0.0.1/a.png"}}},
            "unknown key 'image'; allowed: content,",
        ),
        ({"role": "user", "content": 5}, "content: should be a text, an attachment, or a list of these"),
        ({"role": "user", "content": [["a"]]}, "content.0: should be a text or an attachment, not ['a']"),
        ({"role": "user", "content": {"content": "a"}}, "content.mime_type: is required"),
        ({"role": "user", "content": [{"content": 5, "mime_type": "text/plain"}]}, "content.0.content: "),
        ({"role": "user", "content": {"content": "a", "mime_type": "x" * 201}}, "at most 200 characters"),
        ({"role": "user", "content": "x" * (MAX_CHARACTERS + 1)}, f"at most {MAX_CHARACTERS} characters"),
        ({"role": "user", "content": ["x"] * (MAX_PARTS + 1)}, f"at most {MAX_PARTS}"),
        ({"role": "ipython", "content": "x", "tool_name": "a"}, "call_id: is required"),
        ({"role": "ipython", "content": "x", "call_id": "1", "tool_name": ""}, "should match pattern"),
        ({"role": "user", "content": "x", "name": "Ann"}, "unknown key 'name'; allowed: role, content, context"),
    ],
)
def test_what_is_wrong_in_a_message_is_told(message: dict[str, Any], words: str) -> None:
    assert words in refusal(message)
