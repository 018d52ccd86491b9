"""The load generator, which is compiled where it is used, and what it found."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

SOURCE = Path(__file__).with_suffix(".c")


class NoLoad(Exception):
    """The load generator cannot be had, or cannot ask; the message says why and what to do."""


@dataclass(frozen=True)
class Request:
    """A request and what came of it, as scripts/load_generator.c measured it.

    `first_s` is the time to the first text, `last_s` to the last one, `gaps_s` are the times between the reads that
    brought text. `tokens` is what the server's usage says.
    """

    stream: int
    status: int
    seconds: float
    events: int
    texts: int
    bytes: int
    tokens: int | None
    first_s: float | None
    last_s: float | None
    error: str | None
    gaps_s: list[float]


@dataclass(frozen=True)
class Found:
    """All requests of a load, how long they took together, and what the load generator itself cost."""

    seconds: float
    cpu_seconds: float
    requests: list[Request]

    @property
    def tokens(self) -> int:
        return sum(request.tokens or 0 for request in self.requests)

    @property
    def errors(self) -> list[str]:
        """What went wrong, of each request that was not answered."""
        return [f"{one.error} (status {one.status})" for one in self.requests if one.error is not None]


class LoadGenerator:
    """The compiled program."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    @contextmanager
    def compiled(cls, *options: str) -> Iterator["LoadGenerator"]:
        """Compiles it into a temporary folder. Raises NoLoad without a compiler, or where it does not compile."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise NoLoad("there is no C compiler (cc or gcc) for the load generator: install one (apt install gcc)")
        with TemporaryDirectory(prefix="stack-load-") as folder:
            program = Path(folder) / "load_generator"
            command = [compiler, "-O2", "-std=gnu11", *options, "-o", str(program), str(SOURCE)]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                raise NoLoad(f"{compiler} does not compile {SOURCE.name}: {made.stderr.strip()[-2000:]}")
            yield cls(program)

    def ask(
        self,
        url: str,
        body: dict[str, Any] | None = None,
        *,
        streams: int = 1,
        requests: int = 1,
        timeout: float = 120,
    ) -> Found:
        """Asks on so many connections, on each so many times, and waits for the end. GET where there is no body."""
        with TemporaryDirectory(prefix="stack-load-") as folder:
            command = self._command(url, streams, "--requests", str(requests), "--timeout", str(timeout))
            if body is not None:
                file = Path(folder) / "body.json"
                file.write_text(json.dumps(body))
                command += ["--body", str(file)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise NoLoad(ended.stderr.strip() or f"the load generator ended with {ended.returncode}")
        return _found(json.loads(ended.stdout))

    @contextmanager
    def idle(self, url: str, connections: int, at_once: int = 16) -> Iterator["Idle"]:
        """Connections that have each asked once, and then keep still. Raises NoLoad where one was not answered."""
        command = [*self._command(url, connections, "--at-once", str(at_once)), "--hold"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            idle = Idle()
            try:
                lines = ""
                while not lines.endswith("]}\n") and (line := process.stdout.readline()):
                    lines += line
                if not lines:
                    raise NoLoad(process.stderr.read().strip())
                if errors := _found(json.loads(lines)).errors:
                    raise NoLoad(f"{len(errors)} of {connections} idle connections were not answered: {errors[0]}")
                yield idle
            finally:
                process.stdin.close()
                last = process.stdout.readline()
                idle.still_open = json.loads(last)["still_open"] if last else 0

    def _command(self, url: str, streams: int, *options: str) -> list[str]:
        parts = urlsplit(url)
        where = ["--host", str(parts.hostname), "--port", str(parts.port), "--path", parts.path or "/"]
        return [str(self._program), *where, "--streams", str(streams), *options]


@dataclass
class Idle:
    """Idle connections; how many of them the server had kept until the end is known after it."""

    still_open: int = 0


def _found(value: dict[str, Any]) -> Found:
    return Found(value["seconds"], value["cpu_seconds"], [Request(**one) for one in value["requests"]])
