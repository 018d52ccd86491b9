"""The oldest client of the agentic system, llama-toolchain 0.0.17, as it is, in a process of its own.

It is fetched by its hash, with what it imports, where that can be done.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from serve_apps import gateway
from stack.context import Context
from tests.fetched import fetched
from tests.scripted_agents import MODEL, Body, Model, call, open_context

OURS = Path(__file__).parents[1] / "toolchain_client.py"
# Which the client's own program asks.
LLAMA = "Meta-Llama3.1-8B-Instruct"
SECONDS = 60
# What our program asks.
OWN = ("How hot is it when polyjuice boils?", "How long is it stirred?")
# What the model says to what they ask: what it calls at first, and then the answer.
SCRIPT = {
    "Who are you?": ("I am a script.",),
    "what is the 100th prime number?": (call("wolfram_alpha", query="100th prime"), "It is 541."),
    "Search web for who was 44th President of USA?": (call("brave_search", query="44th president"), "Barack Obama."),
    "Write code to check if a number is prime. Use that to check if 7 is prime": (
        call("code_interpreter", code="print(all(7 % n for n in range(2, 7)))"),
        "It is prime.",
    ),
    "What is the boiling point of polyjuicepotion ?": (call("get_boiling_point", liquid_name="polyjuice"),),
    OWN[0]: (call("get_boiling_point", liquid_name="polyjuice"), "It is 99 degrees."),
    OWN[1]: ("For a month.",),
}


def say(body: Body) -> str:
    """By the last thing that the user has said, and how often it was called a tool since."""
    asked = max(at for at, message in enumerate(body["messages"]) if message["role"] == "user")
    question = next(one for one in SCRIPT if str(body["messages"][asked]["content"]).startswith(one))
    return SCRIPT[question][sum(message["role"] == "tool" for message in body["messages"][asked:])]


@pytest.fixture(scope="session")
def toolchain() -> Path:
    """A folder for PYTHONPATH."""
    return fetched("toolchain")


@pytest.fixture
def model() -> Model:
    model = Model()
    model.say = say
    return model


@pytest.fixture
def context(toolchain: Path, home: Path, store_url: str, model: Model) -> Iterator[Context]:
    context = open_context(store_url, model, models=[MODEL | {"id": LLAMA}])
    yield context
    context.close()


@pytest.fixture
def port(context: Context, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a real server."""
    for name in ("BRAVE_SEARCH_KEY", "BING_SEARCH_KEY", "WOLFRAM_ALPHA_KEY"):
        monkeypatch.delenv(name, raising=False)

    async def ready() -> dict[str, str]:
        return {}

    app: FastAPI = gateway.create_app(context, ready)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(timeout=SECONDS)
        assert not thread.is_alive()


def run(toolchain: Path, *arguments: str) -> list[str]:
    """The lines that a program prints which finds the client."""
    environment = os.environ | {"PYTHONPATH": str(toolchain), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_its_own_program_gets_all_its_answers(toolchain: Path, port: int) -> None:
    """Of its prompts, one is answered, three have a tool of ours called, and one calls a function of the client."""
    lines = run(toolchain, "-m", "llama_toolchain.agentic_system.client", "127.0.0.1", str(port))
    said = dict.fromkeys(SCRIPT, "")
    for line in lines:
        if line.startswith("User> "):
            question = line.removeprefix("User> ")
        else:
            said[question] += f"{line}\n"
    for question, answers in SCRIPT.items():
        if question in OWN:
            continue
        assert answers[-1].strip() in said[question]
    for name in ("wolfram_alpha", "brave_search", "code_interpreter"):
        (answered,) = (text for text in said.values() if f"Tool:BuiltinTool.{name} Response:" in text)
        # Of the search and of Wolfram Alpha there are no keys here.
        wanted = "Response:True" if name == "code_interpreter" else "Response:The call failed: there is no key for it"
        assert wanted in answered
    assert not any("Error with parsing" in line or "error" in line for line in lines)


def test_a_function_that_it_runs_and_a_document_that_it_attaches(toolchain: Path, port: int) -> None:
    told = [json.loads(line) for line in run(toolchain, str(OURS), f"http://127.0.0.1:{port}", LLAMA)]
    logged = "".join(line["log"] for line in told)
    assert logged.count("No Violation") == 2, "the agent's shield judges both turns"
    assert 'CustomTool> {"liquid": "polyjuice", "celsius": 99}' in logged
    assert "The potion has to be stirred for a month." in logged
    turns = [line["value"]["turn"] for line in told if line["type"] == "AgenticSystemTurnResponseTurnCompletePayload"]
    # The first turn ends with the call, of which the client keeps the end to itself.
    assert [turn["output_message"]["content"] for turn in turns] == ["It is 99 degrees.", "For a month."]
    assert [message["role"] for turn in turns for message in turn["input_messages"]] == ["ipython", "user"]
