"""A server that speaks S3, in this process and on loopback: tests talk to it as users do to theirs."""

import logging
import re
import uuid
from collections import Counter
from collections.abc import Iterator

import pytest
import s3fs
from moto.server import ThreadedMotoServer


class S3:
    """The server: its address, and how often each HTTP method was asked of it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: Counter[str] = Counter()

    def bucket(self) -> str:
        """The address of a prefix in a new bucket."""
        name = f"bucket-{uuid.uuid4().hex}"
        s3fs.S3FileSystem().mkdir(name)
        self.requests.clear()
        return f"s3://{name}/some/prefix"


class _Count(logging.Handler):
    """Counts what the server logs, a line a request."""

    def __init__(self, requests: Counter[str]) -> None:
        super().__init__()
        self.requests = requests

    def emit(self, record: logging.LogRecord) -> None:
        line = re.search(r'"(?:\x1b\[\d+m)*([A-Z]+) ', record.getMessage())
        if line:
            self.requests[line[1]] += 1


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3 = S3(f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()  # of clients that look for another server
    log = logging.getLogger("werkzeug")
    handler = _Count(s3.requests)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield s3
    log.removeHandler(handler)
    server.stop()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An S3 server, in the variables in which AWS's own tools look for it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3_server
