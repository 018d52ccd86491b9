"""`python -m stack`: what it prints, what it refuses, and which database it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stack.__main__ import main
from stack.config import Config
from stack.keys import Keyring
from stack.store import Store
from tests.conftest import CONFIG

CREATE = ["keys", "create", "--tenant", "acme", "--name", "ci"]


@pytest.fixture
def configured(home: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The tests' config, by the environment."""
    monkeypatch.setenv("STACK_CONFIG", json.dumps(CONFIG))
    return Config.from_environment()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that works."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command prints that is refused."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


def test_a_key_is_made_listed_and_revoked(configured: Config, capsys: pytest.CaptureFixture[str]) -> None:
    key = run(capsys, *CREATE, "--scopes", "inference, data").strip()
    store = Store(configured.store_url)
    assert Keyring(store).find(key).scopes == {"inference", "data"}
    listed = run(capsys, "keys", "list")
    key_id = key.split("_")[1]
    assert [line.split()[:4] for line in listed.splitlines()[1:]] == [[key_id, "acme", "ci", "inference,data"]]
    assert key not in listed
    assert "is revoked" in run(capsys, "keys", "revoke", key_id)
    assert store.keys.list()[0].revoked_at is not None
    assert "is revoked" in run(capsys, "keys", "revoke", key_id)
    store.close()


def test_as_json(configured: Config, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(run(capsys, *CREATE, "--scopes", "admin", "--json"))
    assert made["key"].startswith(f"lsr_{made['id']}_")
    (listed,) = json.loads(run(capsys, "keys", "list", "--json"))
    assert listed == {name: value for name, value in made.items() if name != "key"}
    assert set(listed) == {"id", "tenant", "name", "scopes", "created_at", "revoked_at"}
    assert json.loads(run(capsys, "keys", "list", "--tenant", "other", "--json")) == []
    assert run(capsys, "keys", "list", "--tenant", "other") == "there are no keys\n"


def test_without_a_tenant_it_is_the_default_one(configured: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "keys", "create", "--name", "n", "--scopes", "data", "--json"))["tenant"] == "default"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*CREATE, "--scopes", "data,root"], ["'root'", "allowed: inference, data"]),
        ([*CREATE, "--scopes", ","], ["at least one scope"]),
        (["keys", "create", "--tenant", "a.b", "--name", "n", "--scopes", "data"], ["'a.b'", "1 to 63"]),
        (["keys", "create", "--tenant", "a", "--name", "", "--scopes", "data"], ["1 to 200"]),
        (["keys", "revoke", "0123456789abcdef"], ["'0123456789abcdef'"]),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    configured: Config, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    line = refused(capsys, *arguments)
    assert line.startswith("stack: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("arguments", [[], ["keys"], ["keys", "make"], ["keys", "create"], ["keys", "revoke"], ["x"]])
def test_half_a_command_is_refused_with_its_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m stack" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["keys"], ["keys", "create"], ["keys", "list"], ["keys", "revoke"]])
def test_help_says_where_the_keys_are(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    assert "STACK_CONFIG" in capsys.readouterr().out


def test_a_missing_config_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_CONFIG", "/none/stack.yaml")
    assert "/none/stack.yaml cannot be read" in refused(capsys, "keys", "list")


@pytest.mark.parametrize(
    "store",
    ["/proc/none/stack.db", "postgresql://nobody@127.0.0.1:1/none", "nonsense://x", "sqlite:////dev/null/a.db"],
)
def test_a_database_that_cannot_be_used_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: str
) -> None:
    monkeypatch.setenv("STACK_CONFIG", json.dumps(CONFIG | {"store": store}))
    monkeypatch.setenv("PGPASSWORD", "hush")
    line = refused(capsys, "keys", "list")
    assert "the database cannot be" in line
    assert "hush" not in line


def test_it_runs_as_a_module(configured: Config) -> None:
    command = [sys.executable, "-m", "stack", *CREATE, "--scopes", "data"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    store = Store(configured.store_url)
    assert Keyring(store).find(done.stdout.strip()).tenant == "acme"
    store.close()
