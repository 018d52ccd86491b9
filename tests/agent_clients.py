"""An agent of a running stack, as its client has it."""

import json
from collections.abc import Generator
from typing import Any

import httpx

# The parameters of a scripted model's answers: it says what stands behind `say:` (serve_apps/scripted_engine.py).
CODE = {"type": "code_interpreter", "enable_inline_code_execution": True}
Events = Generator[tuple[str, dict[str, Any]]]


def calls(name: str, **arguments: Any) -> str:
    """What a user says for the scripted model to call a tool."""
    return f"say:{json.dumps({'name': name, 'parameters': arguments})}"


class Agent:
    """One with a session. Its turns are streamed."""

    def __init__(self, client: httpx.Client, model: str, **config: Any) -> None:
        self.client = client
        given = {"model": model, "instructions": "You are brief.", "sampling_params": {"strategy": "greedy"}} | config
        self.id = self.post("create", agent_config=given)["agent_id"]
        self.session = self.new_session()

    def new_session(self) -> str:
        made = self.post("session/create", agent_id=self.id, session_name="a session")
        return str(made["session_id"])

    def post(self, path: str, **body: Any) -> Any:
        reply = self.client.post(f"/agentic_system/{path}", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def turn(self, *messages: Any, **fields: Any) -> dict[str, Any]:
        """The whole of a turn that is completed. A text is what the user says."""
        *_, (_, last) = self.events(*messages, **fields)
        assert last.get("event_type") == "turn_complete", last
        turn: dict[str, Any] = last["turn"]
        return turn

    def events(self, *messages: Any, **fields: Any) -> Events:
        """The events of a new turn, with their ids: their payloads, or an error as it is sent."""
        said = [{"role": "user", "content": one} if isinstance(one, str) else one for one in messages]
        body = {"agent_id": self.id, "session_id": self.session, "messages": said, "stream": True} | fields
        yield from self._streamed("POST", "turn/create", json=body)

    def events_of(self, turn_id: str, after: str | None = None) -> Events:
        """The events of a turn behind one of them."""
        asked = {"agent_id": self.id, "turn_id": turn_id} | ({"after": after} if after else {})
        yield from self._streamed("GET", "turn/events", params=asked)

    def get_turn(self, turn_id: str) -> dict[str, Any]:
        reply = self.client.get("/agentic_system/turn/get", params={"agent_id": self.id, "turn_id": turn_id})
        assert reply.status_code == 200, reply.text
        turn: dict[str, Any] = reply.json()
        return turn

    def _streamed(self, method: str, path: str, **asked: Any) -> Events:
        event_id = ""
        with self.client.stream(method, f"/agentic_system/{path}", **asked) as reply:
            if reply.status_code != 200:
                raise AssertionError(reply.read().decode())
            for line in reply.iter_lines():
                if line.startswith("id: "):
                    event_id = line[4:]
                elif line.startswith("data: "):
                    told = json.loads(line[6:])
                    yield event_id, told["event"]["payload"] if "event" in told else told
