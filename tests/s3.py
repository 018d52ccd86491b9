"""A server that speaks S3, in this process: tests talk to it as users do to theirs."""

import logging
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

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
        s3fs.S3FileSystem(key="test", secret="test", endpoint_url=self.address).mkdir(name)
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


@contextmanager
def server(host: str = "127.0.0.1") -> Iterator[S3]:
    """A server for as long as the block, which listens at an address of this machine."""
    moto = ThreadedMotoServer(host, 0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    s3 = S3(f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()  # of clients that look for another server
    log = logging.getLogger("werkzeug")
    handler = _Count(s3.requests)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield s3
    finally:
        log.removeHandler(handler)
        moto.stop()


def variables(address: str) -> dict[str, str]:
    """Those by which AWS's own tools find the server."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL_S3": address}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    with server() as s3:
        yield s3


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An S3 server, in the variables in which AWS's own tools look for it."""
    for name, value in variables(s3_server.address).items():
        monkeypatch.setenv(name, value)
    return s3_server
