"""A database that is to be asked by TLS is not asked in the clear."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from sqlalchemy.exc import OperationalError

from stack.store.connection import connect

# What a client of PostgreSQL begins with: a length of 8, and that it asks for TLS, or for GSSAPI.
ASKS_FOR_MORE = {(8).to_bytes(4) + (80877103).to_bytes(4), (8).to_bytes(4) + (80877104).to_bytes(4)}


class WithoutTls:
    """A server that knows no TLS, and keeps what it is told in the clear before it hangs up."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.told = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """May have been called before; then, `told` is whole."""
        if self._thread.is_alive():
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            with client:
                while (words := client.recv(1_000)) in ASKS_FOR_MORE:
                    client.sendall(b"N")
                self.told += words


@pytest.fixture
def server() -> Iterator[WithoutTls]:
    with closing(WithoutTls()) as server:
        yield server


def ask(url: str) -> str:
    """Why there is no connection."""
    engine = connect(url)
    with pytest.raises(OperationalError) as refused:
        engine.connect()
    engine.dispose()
    return str(refused.value)


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca"])
@pytest.mark.parametrize("place", ["address", "environment"])
def test_a_server_without_tls_is_told_nothing(
    server: WithoutTls, mode: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://stack@127.0.0.1:{server.port}/stack"
    if place == "address":
        url += f"?sslmode={mode}&sslrootcert=/secrets/database-ca.pem"
    else:
        monkeypatch.setenv("PGSSLMODE", mode)
        monkeypatch.setenv("PGSSLROOTCERT", "/secrets/database-ca.pem")
    assert "server does not support SSL, but SSL was required" in ask(url)
    server.close()
    assert server.told == b""


def test_it_is_asked_in_the_clear_where_nothing_is_said_of_it(server: WithoutTls) -> None:
    ask(f"postgresql://stack@127.0.0.1:{server.port}/stack")
    server.close()
    assert b"user\0stack" in server.told
