"""What the drivers share: a stack at an address, asked over HTTP alone, and how they begin and end.

They say what they do on the standard error, and their result on the standard output: in words, or with --json as one
object. A key, where the stack asks for one, is in the environment variable STACK_API_KEY.
"""

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from scripts.drivers.patience import Patient

ADDRESS = "http://127.0.0.1:8321"
KEY = "STACK_API_KEY"
# How long one answer may take: a model that has scaled to zero starts first.
TIMEOUT_S = 900
CONNECT_S = 10
# … and one that tells what is there already: a node that has lost its power does not say so.
GET_S = 60
# Fields that name what a request makes: the same once more makes nothing new.
NAMES = ("job_uuid", "uuid", "id")
LOOK_S = 2.0
ENDINGS = {"failed": "failed", "cancelled": "was cancelled"}


class Refused(Exception):
    """The stack has refused a request, or a job has not come to its end; the message says why."""


class Missing(Refused):
    """What was asked for is not there."""


class Stack:
    """A stack that is asked by `client`, again where it is away for a while. While a job runs it is looked at again and
    again, `wait` seconds apart."""

    def __init__(self, client: httpx.Client, wait: Callable[[float], None] = time.sleep) -> None:
        self._client = client
        self._patient = Patient(client, wait)
        self._wait = wait

    @classmethod
    def at(cls, address: str) -> "Stack":
        """The stack at an address, with the key of the environment."""
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return cls(httpx.Client(base_url=address, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_S)))

    def get(self, path: str, **parameters: Any) -> Any:
        timeout = httpx.Timeout(GET_S, connect=CONNECT_S)
        request = partial(self._client.build_request, "GET", path, params=parameters, timeout=timeout)
        return _answer(self._patient.send(request, repeatable=True))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = partial(self._client.build_request, "POST", path, json=body)
        return _answer(self._patient.send(request, repeatable=any(name in body for name in NAMES)))

    def upload(self, file: Path) -> str:
        """Sends a file; returns the address at which a data set finds it."""
        with file.open("rb") as content:
            files = {"file": (file.name, content)}
            request = partial(self._client.build_request, "POST", "/datasets/upload", files=files)
            return str(_answer(self._patient.send(request, repeatable=False))["content_url"])

    def events(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The events of a streamed answer, until its end. Raises Refused where one of them is an error."""
        request = partial(self._client.build_request, "POST", path, json=body)
        with closing(self._patient.send(request, repeatable=False, stream=True)) as reply:
            if reply.status_code != 200:
                _answer(reply)
            for line in reply.iter_lines():
                if not line.startswith("data:") or (data := line.removeprefix("data:").strip()) == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise Refused(_message(event))
                yield event

    def finished(self, api: str, job_uuid: str) -> dict[str, Any]:
        """Waits for the end of a job, saying how far it is. Raises Refused where that is not `completed`."""
        said = ""
        while True:
            status: dict[str, Any] = self.get(f"{api}/job/status", job_uuid=job_uuid)
            if status["status"] == "completed":
                return status
            if status["status"] in ENDINGS:
                raise Refused(
                    f"the job {job_uuid} {ENDINGS[status['status']]}: {status.get('error') or 'no reason given'}"
                )
            if (told := _progress(status)) != said:
                said = told
                say(f"{job_uuid}: {told}")
            self._wait(LOOK_S)


def _progress(status: dict[str, Any]) -> str:
    if progress := status.get("progress"):
        return f"{progress['done']} of {progress['total']} {progress['unit']}"
    return status.get("waiting_for") or str(status["status"])


def _answer(reply: httpx.Response) -> Any:
    if reply.status_code == 200:
        return reply.json()
    try:
        why = _message(reply.json())
    except ValueError:
        why = reply.text[:500]
    kind = Missing if reply.status_code == 404 else Refused
    raise kind(f"{reply.request.method} {reply.request.url.path} answered {reply.status_code}: {why}")


def _message(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message") if isinstance(error, dict) else answer)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def new_id(what: str) -> str:
    """An id for a job that is named by nobody: others may begin in the same second."""
    return f"{what}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def drive(
    description: str | None,
    options: Callable[[argparse.ArgumentParser], None],
    run: Callable[[Stack, argparse.Namespace], dict[str, Any]],
    words: Callable[[dict[str, Any]], str],
) -> int:
    """Runs a driver: `options` adds its arguments, `run` does it, and `words` says what came of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=ADDRESS, help=f"the gateway's address ({ADDRESS}); its key is in {KEY}")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options(parser)
    arguments = parser.parse_args()
    try:
        result = run(Stack.at(arguments.address), arguments)
    except Refused as error:
        say(f"refused: {error}")
        return 1
    except OSError as error:
        say(f"failed: {error}")
        return 1
    except httpx.HTTPError as error:
        say(f"failed: the stack at {arguments.address} did not answer ({error!r})")
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result, ensure_ascii=False) if arguments.json else words(result))
    return 0
