"""What scripts/serve refuses before it starts anything: mistakes in the Serve file, and a home that is in use."""

import copy
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import local_stack, serve
from scripts.local_stack import CONFIG, StartFailed, only_stack, read_serve_file
from stack.__main__ import main as stack_command
from stack.errors import BadInput

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.address import host_of

REWARD_MODEL = yaml.safe_load(CONFIG.read_text())["applications"][3]["args"]["model"]
Change = Callable[[dict[str, Any]], object]


def changed(folder: Path, change: Change) -> Path:
    """The default config file with a change."""
    document = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
    change(document)
    file = folder / "stack config.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def rename(document: dict[str, Any]) -> None:
    document["applications"][1]["name"] = "Other"


def add_application(document: dict[str, Any]) -> None:
    added = dict(document["applications"][1], name="second", route_prefix=None)
    document["applications"].append(added)


def replace_model(document: dict[str, Any], **values: Any) -> None:
    """Changes the model in its application alone."""
    application = document["applications"][1]
    application["args"] = dict(application["args"], model=application["args"]["model"] | values)


def test_the_default_file_is_right() -> None:
    file = read_serve_file(CONFIG)
    assert (file.host, file.port, file.url) == ("127.0.0.1", 8321, "http://127.0.0.1:8321")
    ids = ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2", "injection-classifier", "reward-on-MiniLM"]
    assert [model.id for model in file.config.all_models] == ids


def test_a_scripted_engine_may_take_the_place_of_the_models(tmp_path: Path) -> None:
    scripted = {"import_path": "serve_apps.scripted_engine:build"}
    file = changed(tmp_path, lambda document: document["applications"][1].update(scripted))
    assert [model.id for model in read_serve_file(file).config.models] == ["SmolLM2-135M-Instruct"]
    renamed = changed(tmp_path, lambda document: document["applications"][1].update(scripted, name="Other"))
    with pytest.raises(StartFailed, match="'Other' serves a model that is not among the gateway's models"):
        read_serve_file(renamed)


def test_another_port_is_deployed_too() -> None:
    file = read_serve_file(CONFIG, 9000)
    assert (file.port, file.document["http_options"]["port"]) == (9000, 9000)


@pytest.mark.parametrize("options", [None, {}])
def test_without_options_it_listens_on_loopback_only(tmp_path: Path, options: object) -> None:
    file = read_serve_file(changed(tmp_path, lambda document: document.update(http_options=options)))
    assert file.document["http_options"] == {"host": "127.0.0.1", "port": 8000}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(http_options=[8321]), ["http_options", "[8321]"]),
        (lambda d: d["http_options"].update(port="8321"), ["http_options.port", "1 to 65535", "'8321'"]),
        (lambda d: d["http_options"].update(port=True), ["http_options.port", "True"]),
        (lambda d: d["http_options"].update(port=0), ["http_options.port", "not 0"]),
        (lambda d: d["http_options"].update(port=65_536), ["http_options.port", "65536"]),
        (lambda d: d["http_options"].update(port=None), ["http_options.port", "None"]),
        (lambda d: d["http_options"].update(host=127), ["http_options.host", "127"]),
        (lambda d: d["applications"].append("second"), ["a mapping with a name", "'second'"]),
        (rename, ["application 'Other'", "SmolLM2-135M-Instruct"]),
        (add_application, ["application 'second'", "gateway's models"]),
        (lambda d: d["applications"].pop(1), ["model 'SmolLM2-135M-Instruct'", "serve_apps.llm:build"]),
        (lambda d: d["applications"][1].update(import_path="a:b"), ["'SmolLM2-135M-Instruct'", "serve_apps.llm:build"]),
        (lambda d: d["applications"][1].update(args=None), ["'SmolLM2-135M-Instruct'", "a mapping", "None"]),
        (lambda d: d["applications"][1]["args"].pop("model"), ["'SmolLM2-135M-Instruct'", "model"]),
        (lambda d: d["applications"][1]["args"].update(artifacts="s3://b"), ["artifacts must be 'artifacts'"]),
        (lambda d: replace_model(d, dtyp="auto"), ["'SmolLM2-135M-Instruct'", "unknown key 'dtyp'"]),
        (lambda d: replace_model(d, context=4096), ["model.context is 4096", "2048 in the gateway's models"]),
        (lambda d: replace_model(d, id="Other"), ["model.id is 'Other'"]),
        (lambda d: d["applications"].pop(2), ["model 'all-MiniLM-L6-v2'", "serve_apps.embeddings:build"]),
        (
            lambda d: d["applications"][2].update(name="Other"),
            ["'Other'", "gateway's embedding_models", "all-MiniLM-L6"],
        ),
        (
            lambda d: d["applications"][2].update(import_path="serve_apps.llm:build"),
            ["'all-MiniLM-L6-v2'", "not among the gateway's models"],
        ),
        (
            lambda d: d["applications"][0]["args"].pop("embedding_models"),
            ["'all-MiniLM-L6-v2'", "gateway's embedding_models (none)"],
        ),
        (lambda d: d["applications"][2]["args"].pop("model"), ["'all-MiniLM-L6-v2', model"]),
        (lambda d: d["applications"].pop(3), ["model 'reward-on-MiniLM'", "serve_apps.classifiers:build"]),
        (
            lambda d: d["applications"][0]["args"].pop("reward_models"),
            ["'reward-on-MiniLM'", "gateway's classifiers and reward_models (injection-classifier)"],
        ),
        (
            lambda d: d["applications"][3].update(args={"model": REWARD_MODEL | {"max_tokens": 256}}),
            ["model.max_tokens is 256", "512 in the gateway's models"],
        ),
        (
            lambda d: d["applications"][2]["args"].update(model={"id": "all-MiniLM-L6-v2", "path": "elsewhere"}),
            ["model.path is 'elsewhere'", "models/all-MiniLM-L6-v2"],
        ),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, change: Change, words: list[str]) -> None:
    file = changed(tmp_path, change)
    with pytest.raises(StartFailed) as caught:
        read_serve_file(file)
    message = str(caught.value)
    assert message.startswith(f"{file}")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(StartFailed, match=f"--port must be an integer from 1 to 65535, not {port}"):
        read_serve_file(CONFIG, port)


@pytest.mark.parametrize("content", [None, "a: [", "- 1"])
def test_what_is_no_config_file_is_one_line(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "file.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    with pytest.raises(BadInput) as caught:
        read_serve_file(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_home_has_one_stack_at_a_time(tmp_path: Path) -> None:
    home = tmp_path / "a home"
    with only_stack(home), pytest.raises(StartFailed, match=f"another stack uses STACK_HOME {home}"), only_stack(home):
        pytest.fail("there are two")
    with only_stack(home), only_stack(tmp_path / "another"):
        pass


def test_a_home_that_cannot_be_is_refused() -> None:
    with pytest.raises(StartFailed, match="STACK_HOME /proc/home cannot be written to"), only_stack(Path("/proc/home")):
        pytest.fail("it can")


def serve_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    def start() -> str:
        pytest.fail("Ray was started")

    monkeypatch.setattr(local_stack, "start_ray", start)
    monkeypatch.setattr(sys, "argv", ["scripts/serve", *arguments])
    return serve.main()


def test_serve_says_that_the_home_is_in_use(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_stack(home):
        assert serve_command(monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"serve: another stack uses STACK_HOME {home}: stop it, or set another STACK_HOME"


def test_serve_says_what_is_wrong_with_its_config(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(tmp_path, lambda document: document["http_options"].update(port="here"))
    assert serve_command(monkeypatch, "--config", str(file)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"serve: {file}: http_options.port must be an integer")


# Addresses and keys


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8321"),
        ("localhost", "http://localhost:8321"),
        ("0.0.0.0", "http://127.0.0.1:8321"),
        ("192.168.1.5", "http://192.168.1.5:8321"),
        ("::1", "http://[::1]:8321"),
        ("::", "http://[::1]:8321"),
    ],
)
def test_the_stack_is_reached_from_its_own_machine(tmp_path: Path, host: str, url: str) -> None:
    file = read_serve_file(changed(tmp_path, lambda document: document["http_options"].update(host=host)))
    assert (file.host, file.url) == (host, url)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_without_keys_serve_listens_to_no_other_machine(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    file = changed(tmp_path, lambda document: document["http_options"].update(host=host))
    assert serve_command(monkeypatch, "--config", str(file)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve: there are no API keys")
    assert host in line
    assert "`python -m stack keys create" in line


def test_with_a_key_serve_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(tmp_path, lambda document: document["http_options"].update(host="0.0.0.0"))
    monkeypatch.setenv("STACK_CONFIG", str(file))
    assert stack_command(["keys", "create", "--name", "n", "--scopes", "admin"]) == 0
    capsys.readouterr()
    assert serve_command(monkeypatch, "--config", str(file)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "run scripts/setup" in line, "the next thing that is looked at is the model, which is not there"


def test_a_database_that_cannot_be_used_is_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["http_options"].update(host="0.0.0.0")
        document["applications"][0]["args"].update(store="postgresql://nobody@127.0.0.1:1/none")

    monkeypatch.setenv("PGPASSWORD", "hush")
    assert serve_command(monkeypatch, "--config", str(changed(tmp_path, change))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve: the database cannot be used: ")
    assert "hush" not in line


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "localhost"])
def test_a_taken_port_is_found_in_any_family(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartFailed, match=f"{host}:{port} cannot be used"):
            local_stack.require_free(host, port)
    local_stack.require_free(host, port)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(StartFailed, match="cannot be used"):
        local_stack.require_free("no such host", 8321)


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({"host": "0.0.0.0", "port": 1}, "0.0.0.0"),
        ({"host": "::1"}, "::1"),
        ({"port": 1}, "127.0.0.1"),
        ({}, "127.0.0.1"),
    ],
)
def test_serves_details_tell_where_it_listens(options: dict[str, Any], host: str) -> None:
    assert host_of({"http_options": options, "proxies": {}, "applications": {}}) == host
