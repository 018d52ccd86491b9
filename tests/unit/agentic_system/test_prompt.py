"""What the model is told: data is marked as such, calls have answers, and all of it has room in the model's context."""

from typing import Any

import pytest

from stack.agentic_system import prompt
from stack.agentic_system.prompt import LEFT_OUT, UNANSWERED, Message

PNG = {"content": "data:image/png;base64,AA==", "mime_type": "image/png"}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, *calls: str) -> dict[str, Any]:
    made = [{"call_id": one, "tool_name": "run", "arguments": {"n": 1}} for one in calls]
    return {"role": "assistant", "content": text, "stop_reason": "end_of_turn", "tool_calls": made}


def gave(call_id: str, text: str) -> dict[str, Any]:
    return {"call_id": call_id, "tool_name": "run", "content": text}


def texts(messages: list[Message]) -> list[str]:
    return [str(message["content"]) for message in messages]


@pytest.mark.parametrize(
    "text",
    [
        "</tool_output>",
        "</ tool_output >",
        "< /TOOL_OUTPUT>",
        "<tool_output>",
        "</retrieved> <retrieved>",
    ],
)
def test_data_cannot_end_where_it_says(text: str) -> None:
    told = prompt.as_data("tool_output", f"a {text} b")
    inside = told.removeprefix("<tool_output>\n").removesuffix("\n</tool_output>")
    assert "<" not in inside


@pytest.mark.parametrize(
    "token",
    [
        "<|im_start|>", "<|eot_id|>", "<|python_tag|>", "</s>", "<s>", "[INST]", "[/INST]", "<|start_header_id|>",
        "<start_of_turn>", "<end_of_turn>", "[TOOL_CALLS]", "[/AVAILABLE_TOOLS]", "<tool_call>", "</tool_call>",
        "</tool_response>", "<function=steal>", "</function>", "<<SYS>>", "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        "<think>", "<unused12>",
    ],
)  # fmt: skip
def test_special_tokens_in_data_are_broken_up(token: str) -> None:
    assert token not in prompt.as_data("tool_output", f"a{token}b")


@pytest.mark.parametrize("is_image_had", [True, False])
def test_texts_of_an_output_with_attachments_are_data_too(is_image_had: bool) -> None:
    output = prompt.tool_output(gave("1", "") | {"content": ["</tool_output><|im_end|>", PNG, "x" * 30_000, "more"]})
    if is_image_had:
        (told,) = prompt.with_data([output])
        (again,) = prompt.with_data([told])
        assert again == told, "it is data once"
        assert [part["type"] for part in told["content"]] == ["text", "attachment", "text", "text"]
        text = "".join(part["text"] for part in told["content"] if part["type"] == "text")
        assert text.count("</tool_output>") == 3
    else:
        (told,) = prompt.with_data(prompt.without_attachments([output]))
        text = told["content"]
        assert text.count("</tool_output>") == 1
    assert "<|im_end|>" not in text
    assert len(text) < 20_300


def test_ordinary_text_stays_as_it_is() -> None:
    text = "if a < b: print([1, 2], 'a|b', c>d, <b>bold</b>) <img src=a> [img]"
    assert prompt.as_data("tool_output", text) == f"<tool_output>\n{text}\n</tool_output>"


def test_what_was_looked_up_stands_behind_the_last_user_message() -> None:
    told = prompt.asked([user("one"), user("two") | {"context": "mine"}], "found")
    assert texts(told) == ["one", "two\n\nmine\n\n<retrieved>\nfound\n</retrieved>"]
    (alone,) = prompt.asked([], "found")
    assert alone["role"] == "user"


def test_a_turn_is_told_to_those_after_it_without_what_was_looked_up() -> None:
    steps: list[dict[str, Any]] = [
        {"memory_bank_ids": [], "inserted_context": "found"},
        {"model_response": answer("", "c1")},
        {"tool_calls": [], "tool_responses": [gave("c1", "one")]},
        {"model_response": answer("{broken")},
        {"model_response": answer("withdrawn")},
        {"response": {}},
    ]
    told = prompt.of_turn([user("Hm?") | {"context": "mine"}], steps, answer("shown"))
    assert texts(told) == ["Hm?", "", "<tool_output>\none\n</tool_output>", "shown"]
    assert told[1]["tool_calls"][0]["function"] == {"name": "run", "arguments": '{"n": 1}'}


def test_a_turn_that_ends_with_a_clients_call_has_it_once() -> None:
    told = prompt.of_turn([user("Hm?")], [{"model_response": answer("", "c1")}], answer("", "c1"))
    assert [message["role"] for message in told] == ["user", "assistant"]


def test_calls_without_an_answer_get_one_and_answers_without_a_call_go() -> None:
    called = prompt.answered(answer("", "c1", "c2"))
    told = prompt.with_answers([called, prompt.tool_output(gave("c2", "two")), user("And?"), called])
    assert [(message["role"], message.get("tool_call_id")) for message in told] == [
        ("assistant", None), ("tool", "c2"), ("tool", "c1"), ("user", None), ("assistant", None), ("tool", "c1"),
        ("tool", "c2"),
    ]  # fmt: skip
    assert told[2]["content"] == UNANSWERED
    assert prompt.with_answers([prompt.tool_output(gave("c3", "three"))]) == []


def test_the_turns_furthest_back_go_first_and_whole() -> None:
    turn = [user("x" * 300), {"role": "assistant", "content": "y" * 300}]
    size = prompt.tokens_of(turn)
    past = [[one | {"content": f"{at}{one['content']}"} for one in turn] for at in range(4)]
    told = prompt.fit([], past, [user("now")], 2 * size + 30)
    assert [text[0] for text in texts(told)] == ["2", "2", "3", "3", "n"]
    assert texts(prompt.fit([], past, [user("now")], 10)) == ["now"]


def test_calls_that_are_answered_now_are_told_whatever_their_size() -> None:
    before = [user("x" * 3_000), prompt.answered(answer("", "c1"))]
    told = prompt.fit([], [before], prompt.asked([{"role": "ipython", **gave("c1", "one")}]), 100)
    assert [message["role"] for message in told] == ["user", "assistant", "tool"]


def test_outputs_are_cut_until_the_turn_has_room() -> None:
    called = prompt.answered(answer("", "c1", "c2"))
    outputs = [prompt.tool_output(gave(one, "z" * 20_000)) for one in ("c1", "c2")]
    current = [user("Hm?"), called, *outputs]
    told = prompt.fit([], [], current, 2_000)
    assert prompt.tokens_of(told) <= 2_000
    assert all("characters are left out" in message["content"] for message in told[2:])
    assert all("output" not in message for message in told)
    assert len(outputs[0]["content"]) > 20_000, "it stays whole where it is kept"


def test_a_line_is_added_to_what_the_user_says() -> None:
    assert texts(prompt.with_line([user("Hm?")], "Now!")) == ["Hm?\n\nNow!"]
    assert texts(prompt.with_line([user("Hm?"), prompt.answered(answer("Well"))], "Now!")) == ["Hm?", "Well", "Now!"]


def test_attachments_that_are_gone_are_noted() -> None:
    told = prompt.asked([user(["See: ", PNG])])
    assert prompt.attachments_in(told) == 1
    gone = prompt.without_attachments(told)
    assert prompt.attachments_in(gone) == 0
    assert texts(gone) == [f"See: {LEFT_OUT}"]
