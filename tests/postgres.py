"""A PostgreSQL server for the tests: a private one in a temporary folder, which ends with the process that started it.

With STACK_TEST_POSTGRES, the address of a server on which one may create databases (postgresql://user@host/postgres),
that one is used instead.
"""

import glob
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import create_engine, make_url, text

from stack.store.schema import schema

START_S = 60
MISSING = (
    "these tests need PostgreSQL 15 or newer: apt install postgresql, or name a server on which databases may be "
    "created: STACK_TEST_POSTGRES=postgresql://user@host/postgres"
)


class Server:
    """A running server."""

    def __init__(self, url: str) -> None:
        given = make_url(url).set(drivername="postgresql+psycopg")
        if given.password is not None:  # a Config takes no address with one
            os.environ["PGPASSWORD"] = given.password
        self._url = given._replace(password=None)
        self._engine = create_engine(self._url, isolation_level="AUTOCOMMIT")
        self._clean: list[str] = []

    @contextmanager
    def database(self) -> Iterator[str]:
        """The address of a database without rows, with today's schema; it is used again, which is much faster."""
        name = self._clean.pop() if self._clean else self._create()
        try:
            yield self._address(name)
        finally:
            self._give_back(name)

    @contextmanager
    def empty_database(self) -> Iterator[str]:
        """The address of a database without tables."""
        name = self._create()
        try:
            yield self._address(name)
        finally:
            self._drop(name)

    def close(self) -> None:
        for name in self._clean:
            self._drop(name)
        self._engine.dispose()

    def _give_back(self, name: str) -> None:
        """Empties a database for the next one to use; one whose tables a test has taken away is dropped."""
        emptied = "; ".join(f"DELETE FROM {table.name}" for table in reversed(schema.sorted_tables))
        try:
            with psycopg.connect(self._address(name).replace("+psycopg", "", 1)) as connection:
                connection.execute(emptied)
        except psycopg.errors.UndefinedTable:
            self._drop(name)
        else:
            self._clean.append(name)

    def _address(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def _create(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        with self._engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        return name

    def _drop(self, name: str) -> None:
        with self._engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def server() -> Iterator[Server]:
    """A server for as long as the block. Raises RuntimeError if there is none and none can be started."""
    if url := os.environ.get("STACK_TEST_POSTGRES"):
        with closing(Server(url)) as given:
            yield given
        return
    with private() as own, closing(Server(own.url)) as server_:
        yield server_


@contextmanager
def private(address: str = "") -> Iterator["Private"]:
    """A running server for this block alone, which may stop and start it. Raises RuntimeError if there can be none.

    With an address it listens there too, at PostgreSQL's own port, to whoever of that network knows a password.
    """
    folder = Path(tempfile.mkdtemp(prefix="stack-test-postgres-"))
    try:
        own = Private(folder, address)
        own.start()
        try:
            yield own
        finally:
            own.stop()
    finally:
        shutil.rmtree(folder)


class Private:
    """A server that is reached by a socket in its folder, and told to stop when this process dies, however it does."""

    def __init__(self, folder: Path, address: str = "") -> None:
        self.url = f"postgresql://postgres@/postgres?host={folder}"
        self._folder = folder
        self._address = address
        self._programs = _programs()
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user, self._user)
        self._initialize()

    def start(self) -> None:
        ids = [f"--reuid={self._user}", f"--regid={self._user}", "--init-groups"] if self._user else []
        fast = ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off", "-c", "autovacuum=off"]
        where = ["-D", str(self._folder / "data"), "-k", str(self._folder), "-c", f"listen_addresses={self._address}"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig=INT", *ids, str(self._programs / "postgres"), *where,
                    "-c", "max_connections=200", *fast,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder,
            )  # fmt: skip
        self._wait_until_it_answers()

    def stop(self) -> None:
        """Ends the server and with it all connections; it may have been ended before."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=START_S)

    def _initialize(self) -> None:
        # Texts are ordered as in a language, not by their bytes, so that what relies on the latter fails here.
        order = ["--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en"]
        made = subprocess.run(
            [
                str(self._programs / "initdb"), "--auth=trust", "--username=postgres", "--no-sync", *order,
                str(self._folder / "data"),
            ],
            user=self._user, group=self._user, cwd=self._folder, capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode != 0:
            raise RuntimeError(f"{MISSING}\n{made.stderr}")
        if self._address:
            with (self._folder / "data" / "pg_hba.conf").open("a") as rules:
                rules.write("host all all samenet scram-sha-256\n")

    def _wait_until_it_answers(self) -> None:
        deadline, pause = time.monotonic() + START_S, threading.Event()
        while True:
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL did not start: {(self._folder / 'log').read_text()}") from None
            pause.wait(0.05)


def _programs() -> Path:
    """The folder of the newest PostgreSQL here."""
    found = [Path(path).parent for path in glob.glob("/usr/lib/postgresql/*/bin/initdb")]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    if not found:
        raise RuntimeError(MISSING)
    return max(found, key=lambda path: [int(part) for part in path.parts if part.isdecimal()])
