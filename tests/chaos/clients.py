"""What the clients of a chaos run ask, what they remember of it, and whether all of that is there exactly once."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from stack.memory_banks.arrow import DOCUMENT
from stack.memory_banks.table import BankTable
from tests import samples
from tests.chaos.load import STALL_S, Again, Client, Wrong, checked

STREAMED_TOKENS = 60  # of a stream of a second
SLOW_TOKENS = 25  # of one that has a token a second
TURNS = 4  # of a session
PAGE = 200
ROWS = 60  # of each job
TENANT = "chaos"
# What a stream's error says that a client asks again.
PASSING = ("unavailable", "too_many_requests")


@dataclass
class Memory:
    """What was acknowledged: documents by their ids, turns by sessions with what was said, jobs, data sets."""

    documents: dict[str, str] = field(default_factory=dict)
    sessions: dict[str, dict[str, str]] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    work: list[str] = field(default_factory=list)  # jobs that nobody cancels
    datasets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """How a job has ended: after how many attempts, and with how many answers in the data set that it has made."""

    uuid: str
    status: str
    attempts: int
    rows: int

    @property
    def met(self) -> bool:
        return self.status == "completed" and self.rows == ROWS


@dataclass
class Kinds:
    """The kinds of requests: each method does one of its kind, by a client of its own."""

    model: str
    agent: str
    bank: str
    upload: str
    memory: Memory = field(default_factory=Memory)
    _turns: dict[int, list[str]] = field(default_factory=dict)  # by client: its session, and those that it had

    def chat(self, client: Client) -> None:
        word = f"w{client.random.randrange(10**9)}"

        def send(http: httpx.Client) -> None:
            body = {"model": self.model, "messages": [{"role": "user", "content": f"say:{word}"}]}
            answer = checked(http.post("/v1/chat/completions", json=body)).json()
            if (said := answer["choices"][0]["message"]["content"]) != word:
                raise Wrong(f"{said!r} is the answer to another request than {word!r}")

        client.do("chat", send)

    def stream(self, client: Client) -> None:
        client.do("stream", lambda http: self._stream(http, "Hello", STREAMED_TOKENS))

    def long_stream(self, client: Client) -> None:
        client.do("long stream", lambda http: self._stream(http, "fault:slow", SLOW_TOKENS))

    def insert(self, client: Client) -> None:
        name = f"d{client.random.randrange(10**12)}"
        text = f"{name}: a river flows from the mountains to the sea, and {name} is its name."
        document = {"document_id": name, "content": text, "mime_type": "text/plain", "metadata": {}}
        client.do(
            "insert",
            lambda http: _done(http.post("/memory_bank/insert", json={"bank_id": self.bank, "documents": [document]})),
        )
        self.memory.documents[name] = text

    def query(self, client: Client) -> None:
        body = {"bank_id": self.bank, "query": "where do rivers flow?", "params": {"max_chunks": 3}}
        client.do("query", lambda http: _done(http.post("/memory_bank/query", json=body)))

    def turn(self, client: Client) -> None:
        """A turn of a session that this client has, or makes."""
        had = self._turns.get(id(client), [])
        if not had or len(self.memory.sessions[had[0]]) >= TURNS:
            had = self._turns[id(client)] = [self._session(client)]
        session, word = had[0], f"w{client.random.randrange(10**9)}"
        told: dict[str, str] = {}  # the turn's id, once it is known, and that of the last event

        def send(http: httpx.Client) -> None:
            if turn := told.get("turn"):
                asked = {"agent_id": self.agent, "turn_id": turn, "after": told["after"]}
                request = http.build_request("GET", "/agentic_system/turn/events", params=asked)
            else:
                said = [{"role": "user", "content": f"say:{word}"}]
                body = {"agent_id": self.agent, "session_id": session, "messages": said, "stream": True}
                request = http.build_request("POST", "/agentic_system/turn/create", json=body)
            for event_id, payload in _events(http, request):
                if payload["event_type"] == "turn_start":
                    told["turn"] = payload["turn_id"]
                    self.memory.sessions[session][payload["turn_id"]] = word
                told["after"] = event_id
                if payload["event_type"] == "turn_complete":
                    return
            raise Again("broken", "the stream of the turn ends before the turn")

        client.do("turn", send)

    def job(self, client: Client) -> None:
        """A job that is accepted and, so that there is room for others, cancelled."""
        uuid = f"j{client.random.randrange(10**12)}"
        client.do("job", lambda http: _done(http.post("/batch_inference/jobs", json=self._batch(uuid, -1))))
        self.memory.jobs.append(uuid)
        client.do("job", lambda http: _done(http.post("/batch_inference/job/cancel", json={"job_uuid": uuid})))

    def dataset(self, client: Client) -> None:
        uuid = f"s{client.random.randrange(10**12)}"
        body = {"uuid": uuid, "dataset": self._dataset()}
        client.do("data set", lambda http: _done(http.post("/datasets/create", json=body)))
        self.memory.datasets.append(uuid)

    def work(self, client: Client) -> str:
        """A job that is to be done. Returns its id."""
        uuid = f"work{client.random.randrange(10**12)}"
        client.do("work", lambda http: _done(http.post("/batch_inference/jobs", json=self._batch(uuid, 0))))
        self.memory.work.append(uuid)
        return uuid

    def _session(self, client: Client) -> str:
        made: dict[str, str] = {}

        def send(http: httpx.Client) -> None:
            body = {"agent_id": self.agent, "session_name": "of a chaos run"}
            made.update(checked(http.post("/agentic_system/session/create", json=body)).json())

        client.do("session", send)
        self.memory.sessions[made["session_id"]] = {}
        return made["session_id"]

    def _stream(self, http: httpx.Client, text: str, tokens: int) -> None:
        read_stream(http, self.model, text, tokens)

    def _dataset(self) -> dict[str, Any]:
        return {"columns": {"prompt": "text"}, "content_url": self.upload}

    def _batch(self, uuid: str, priority: int) -> dict[str, Any]:
        asked = {"job_uuid": uuid, "model": self.model, "priority": priority, "sampling_params": {"max_tokens": 100}}
        return samples.batch(self._dataset(), **asked)


def read_stream(
    http: httpx.Client, model: str, text: str, tokens: int, begun: Callable[[], object] = lambda: None
) -> None:
    """Reads a streamed answer of so many tokens to its end; calls `begun` for each of its events.

    Raises Again where it breaks off, Wrong where it is another one.
    """
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
    body["max_tokens"] = tokens
    request = http.build_request("POST", "/v1/chat/completions", json=body, timeout=STALL_S)
    count = 0
    for data in _data(http, request):
        if data == "[DONE]":
            if count != tokens:
                raise Wrong(f"a stream of {tokens} tokens has {count}")
            return
        event = json.loads(data)
        _require_no_error(event)
        begun()
        count += sum(1 for choice in event["choices"] if choice["delta"].get("content"))
    raise Again("broken", f"a stream of {tokens} tokens ends after {count}")


def prepare(http: httpx.Client, model: str, embedding_model: str) -> Kinds:
    """Makes what all clients share: an agent, a bank, and a file of rows."""
    given = {"model": model, "instructions": "You are brief.", "sampling_params": {"strategy": "greedy"}}
    agent = checked(http.post("/agentic_system/create", json={"agent_config": given})).json()["agent_id"]
    bank = {
        "name": "chaos",
        "config": {"type": "vector", "embedding_model": embedding_model, "chunk_size_in_tokens": 64},
    }
    bank_id = checked(http.post("/memory_banks/create", json=bank)).json()["bank_id"]
    rows = "".join(json.dumps({"prompt": f"Count on from {number}."}) + "\n" for number in range(ROWS))
    sent = checked(http.post("/datasets/upload", files={"file": ("rows.jsonl", rows.encode())})).json()
    return Kinds(model, agent, bank_id, sent["content_url"])


def ended(http: httpx.Client, uuid: str, seconds: float) -> Work:
    """A job once it has ended, or after so many seconds."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while True:
        status = checked(http.get("/batch_inference/job/status", params={"job_uuid": uuid})).json()
        if status["status"] in ("completed", "failed", "cancelled") or time.monotonic() > deadline:
            break
        pause.wait(1.0)
    made = http.get("/datasets/get", params={"dataset_uuid": f"{uuid}.answers"})
    return Work(uuid, status["status"], len(status["attempts"]), made.json()["rows"] if made.status_code == 200 else 0)


def missing(http: httpx.Client, kinds: Kinds, bucket: str) -> list[str]:
    """What was acknowledged and is not there exactly once, in words."""
    memory = kinds.memory
    found = _documents(http, kinds) + asyncio.run(_rows(kinds, f"{bucket}/memory_banks/{TENANT}/{kinds.bank}"))
    for session, turns in memory.sessions.items():
        found += _turns(http, kinds, session, turns)
    counts = Counter(job["job_uuid"] for job in _pages(http, "/batch_inference/jobs", "job_uuid"))
    found += [
        f"the job {uuid} is there {counts[uuid]} times" for uuid in memory.jobs + memory.work if counts[uuid] != 1
    ]
    counts = Counter(one["uuid"] for one in _pages(http, "/datasets/list", "uuid"))
    found += [f"the data set {uuid} is there {counts[uuid]} times" for uuid in memory.datasets if counts[uuid] != 1]
    return found


def _documents(http: httpx.Client, kinds: Kinds) -> list[str]:
    """What is wrong with the documents as the stack gives them."""
    texts: Counter[tuple[str, str]] = Counter()
    ids = list(kinds.memory.documents)
    for start in range(0, len(ids), PAGE):
        asked = {"document_ids": ids[start : start + PAGE]}
        reply = http.post("/memory_bank/documents/get", params={"bank_id": kinds.bank}, json=asked)
        for line in checked(reply).text.splitlines():
            texts[json.loads(line)["document_id"], json.loads(line)["content"]] += 1
    return [
        f"the document {one} is there {texts[one, text]} times"
        for one, text in kinds.memory.documents.items()
        if texts[one, text] != 1
    ]


async def _rows(kinds: Kinds, address: str) -> list[str]:
    """What is wrong with the rows of the bank, as one who has never opened it finds them: each document has its own and
    one for its only chunk."""
    table = await BankTable.open(address, {"allow_http": "true"})
    read = await table.rows.query().select(["document_id", "position"]).to_arrow()
    counts = Counter(zip(read["document_id"].to_pylist(), read["position"].to_pylist(), strict=True))
    wrong = [f"the row {row} of the bank is there {count} times" for row, count in counts.items() if count > 1]
    for one in kinds.memory.documents:
        wrong += [
            f"the row {position} of {one} is not in the bank" for position in (DOCUMENT, 0) if not counts[one, position]
        ]
    return wrong


def _turns(http: httpx.Client, kinds: Kinds, session: str, turns: dict[str, str]) -> list[str]:
    asked = {"agent_id": kinds.agent, "session_id": session}
    reply = http.post("/agentic_system/session/get", params=asked)
    if reply.status_code == 404:
        return [f"the session {session} is gone"]
    there = Counter(turn["turn_id"] for turn in checked(reply).json()["turns"])
    answers = {turn["turn_id"]: turn for turn in reply.json()["turns"]}
    wrong = []
    for one, word in turns.items():
        if there[one] != 1:
            wrong.append(f"the turn {one} is there {there[one]} times")
        elif (said := (answers[one].get("output_message") or {}).get("content")) != word:
            wrong.append(f"the turn {one} is {answers[one]['state']} and says {said!r} in place of {word!r}")
    return wrong


def _pages(http: httpx.Client, path: str, key: str) -> Iterator[dict[str, Any]]:
    after: dict[str, str] = {}
    while page := checked(http.get(path, params={"limit": "1000"} | after)).json():
        yield from page
        after = {"after": page[-1][key]}


def _done(reply: httpx.Response) -> None:
    checked(reply)


def _require_no_error(event: dict[str, Any]) -> None:
    """Raises Again for an error that a stream ends with and that passes, Wrong for another one."""
    if error := event.get("error"):
        if error["code"] in PASSING:
            raise Again("broken", f"{error['code']}: {error['message']}")
        raise Wrong(f"{error['code']}: {error['message']}")


def _events(http: httpx.Client, request: httpx.Request) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ids and payloads of the events of a turn."""
    last = ""
    for line in _lines(http, request):
        if line.startswith("id: "):
            last = line[4:]
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            _require_no_error(event)
            yield last, event["event"]["payload"]


def _data(http: httpx.Client, request: httpx.Request) -> Iterator[str]:
    return (line[6:] for line in _lines(http, request) if line.startswith("data: "))


@contextmanager
def _sent(http: httpx.Client, request: httpx.Request) -> Iterator[httpx.Response]:
    reply = http.send(request, stream=True)
    try:
        yield checked(reply)
    finally:
        reply.close()


def _lines(http: httpx.Client, request: httpx.Request) -> Iterator[str]:
    with _sent(http, request) as reply:
        yield from reply.iter_lines()
