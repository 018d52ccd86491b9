"""The configuration: what it takes, what it refuses and how it says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stack.config import DEFAULT_FILE, GATEWAY, Config, EmbeddingModel, LanguageModel, RewardModel
from stack.config import home as stack_home
from stack.errors import BadInput
from stack.shield_config import base_of

MODEL = {"id": "small", "path": "models/small"}
JUDGE = {"kind": "judge", "id": "judge", "model": "small", "rubric": "Is it right?"}


def refusal(value: Any) -> str:
    with pytest.raises(BadInput) as caught:
        Config.parse(value, "stack.yaml")
    return caught.value.message


def written(folder: Path, document: Any) -> Path:
    file = folder / "stack.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"models": [MODEL], "stor": "a.db"}, ["unknown key 'stor'", "allowed:", "store", "data_roots", "models"]),
        ({"models": [MODEL | {"dtyp": "auto"}]}, ["models.0", "unknown key 'dtyp'", "dtype", "context"]),
        ({"models": [MODEL | {"dtype": "int3"}]}, ["models.0.dtype", "'int3'", "'float32'", "'bfloat16'"]),
        ({"models": [MODEL | {"context": 0}]}, ["models.0.context", "greater than or equal to 16", "not 0"]),
        ({"models": [MODEL | {"context": "long"}]}, ["models.0.context", "integer", "'long'"]),
        ({"models": [MODEL | {"adapter_rank": 10_000}]}, ["models.0.adapter_rank", "512", "10000"]),
        ({"models": [MODEL | {"prompt_format": "chatml"}]}, ["models.0.prompt_format", "'llama3'", "'chatml'"]),
        ({"models": [MODEL | {"quantization": "bf16"}]}, ["models.0.quantization", "'fp8'", "'bf16'"]),
        ({"models": [MODEL | {"gpus": 4}]}, ["models.0", "gpus is 4", "1 × 1 = 1"]),
        ({"models": [MODEL | {"gpus": 1, "tensor_parallel": 4}]}, ["models.0", "gpus is 1", "4 × 1 = 4"]),
        ({"models": [MODEL | {"accelerator_type": "H100"}]}, ["models.0", "'H100'", "gpus"]),
        ({"models": [MODEL | {"min_replicas": 3, "max_replicas": 2}]}, ["max_replicas is 2", "min_replicas, 3"]),
        ({"models": [MODEL | {"max_replicas": 0}]}, ["models.0.max_replicas", "greater than or equal to 1", "not 0"]),
        ({"models": [MODEL | {"max_ongoing_requests": 8}]}, ["target_ongoing_requests is 64", "at most", "8"]),
        ({"models": [MODEL | {"request_timeout_s": 0}]}, ["models.0.request_timeout_s", "not 0"]),
        ({"models": [MODEL | {"engine": {"dtype": "auto"}}]}, ["models.0.engine", "'dtype'", "beside `engine`"]),
        ({"models": [MODEL | {"engine": {"max_model_len": 9}}]}, ["models.0.engine", "by the key 'context'"]),
        ({"models": [MODEL | {"engine": {"trust_remote_code": True}}]}, ["'trust_remote_code'", "never"]),
        ({"models": [{"id": "small"}]}, ["models.0.path", "is required"]),
        ({"models": [MODEL | {"id": ""}]}, ["models.0.id", "should match pattern"]),
        ({"models": [MODEL | {"id": "org/small"}]}, ["models.0.id", "'org/small'"]),
        ({"models": [MODEL | {"id": "small:tune-1"}]}, ["models.0.id", "'small:tune-1'"]),
        ({"models": [MODEL | {"id": "gateway"}]}, ["models", "'gateway'"]),
        ({"models": [MODEL | {"path": ""}]}, ["models.0.path", "at least 1 character"]),
        ({"models": []}, ["models", "at least 1 item"]),
        ({}, ["models", "is required"]),
        ({"models": [MODEL, MODEL]}, ["'small'", "more than once"]),
        ({"models": [MODEL], "reward_models": [JUDGE | {"model": "smal"}]}, ["'judge'", "'smal'", "allowed: small"]),
        ({"models": [MODEL], "reward_models": [JUDGE | {"model": "smal:tune-1"}]}, ["'judge'", "'smal:tune-1'"]),
        ({"models": [MODEL], "data_roots": []}, ["data_roots", "at least 1 item"]),
        ({"models": [MODEL], "max_running_jobs": 0}, ["max_running_jobs", "greater than or equal to 1", "not 0"]),
        ({"models": [MODEL], "max_body_bytes": -1}, ["max_body_bytes", "1024", "-1"]),
        (["models"], ["dictionary", "['models']"]),
    ],
)
def test_a_wrong_config_is_refused_with_the_key_and_what_is_allowed(value: Any, words: list[str]) -> None:
    message = refusal(value)
    assert message.startswith("stack.yaml: ")
    for word in words:
        assert word in message


def test_defaults_need_only_a_model() -> None:
    config = Config.parse({"models": [MODEL]}, "test")
    assert (config.store, config.artifacts, config.data_roots) == ("stack.db", "artifacts", ["data"])
    assert config.models == [LanguageModel(id="small", path="models/small")]


@pytest.mark.parametrize("model", ["small", "small:tune-1", "small:ann/tune-1", "small-tune-1", "small-tune-1..ann"])
def test_a_judge_and_a_shield_ask_a_model_of_the_config_or_one_that_is_trained_from_it(model: str) -> None:
    shield = {"id": "guard", "type": "llama_guard", "model": model}
    Config.parse({"models": [MODEL], "reward_models": [JUDGE | {"model": model}], "shields": [shield]}, "test")


def test_of_several_models_with_such_a_beginning_the_longest_is_the_base() -> None:
    assert base_of("small-2:tune-1", ["small", "small-2", "small-2-b"]) == "small-2"
    assert base_of("small", ["small", "small-2"]) == "small"
    assert base_of("smaller", ["small"]) is None


def test_replicas_are_as_many_as_their_minimum_unless_there_is_a_maximum() -> None:
    most = [
        LanguageModel.model_validate(MODEL | replicas).most_replicas
        for replicas in ({}, {"min_replicas": 3}, {"min_replicas": 0}, {"min_replicas": 0, "max_replicas": 4})
    ]
    assert most == [1, 3, 1, 4]


def test_a_replica_takes_a_gpu_for_each_of_its_workers() -> None:
    parallel = MODEL | {"tensor_parallel": 4, "pipeline_parallel": 2}
    assert LanguageModel.model_validate(parallel | {"gpus": 8}).workers == 8
    assert LanguageModel.model_validate(parallel).gpus == 0


def test_the_home_folder_is_stack_home_or_in_the_users_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stack_home() == home
    monkeypatch.delenv("STACK_HOME")
    assert stack_home() == Path.home() / ".llama-stack-ray"


def test_a_relative_home_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACK_HOME", "here")
    assert stack_home() == tmp_path / "here"


def test_relative_paths_are_relative_to_the_home_folder(home: Path) -> None:
    config = Config.parse({"models": [MODEL]}, "test")
    assert config.store_url == f"sqlite:///{home}/stack.db"
    assert config.artifacts_url == f"file://{home}/artifacts"
    assert config.data_folders == [home / "data"]
    assert config.models[0].folder == home / "models" / "small"


def test_absolute_paths_stay_as_they_are(home: Path) -> None:
    paths = {
        "store": "/srv/a.db",
        "artifacts": "/srv/a",
        "data_roots": ["/srv/d"],
        "models": [MODEL | {"path": "/srv/m"}],
    }
    config = Config.parse(paths, "test")
    assert config.store_url == "sqlite:////srv/a.db"
    assert config.artifacts_url == "file:///srv/a"
    assert config.data_folders == [Path("/srv/d")]
    assert config.models[0].folder == Path("/srv/m")


def test_a_tilde_is_the_users_own_folder_in_every_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    paths = {"store": "~/a.db", "artifacts": "~/a", "data_roots": ["~/d"], "models": [MODEL | {"path": "~/m"}]}
    config = Config.parse(paths, "test")
    assert config.artifacts_url == "file:///home/ann/a"
    assert config.data_folders == [Path("/home/ann/d")]
    assert config.models[0].folder == Path("/home/ann/m")
    assert config.store_url == "sqlite:////home/ann/a.db"


def test_addresses_stay_as_they_are(home: Path) -> None:
    addresses = {"store": "postgresql://db/stack", "artifacts": "s3://bucket/stack", "models": [MODEL]}
    config = Config.parse(addresses, "test")
    assert (config.store_url, config.artifacts_url) == (addresses["store"], addresses["artifacts"])


def test_the_address_of_the_store_says_how_its_server_is_known(home: Path) -> None:
    address = "postgresql://stack@db/stack?sslmode=verify-full&sslrootcert=/home/stack/secrets/database-ca.pem"
    assert Config.parse({"store": address, "models": [MODEL]}, "test").store_url == address


PASSWORDS = [
    "postgresql://ann:hunter2@db/stack",
    "postgresql+psycopg://ann:hunter2@db:5432/stack?sslmode=require",
    "postgresql://ann@db/stack?password=hunter2",
    "postgresql://ann@db/stack?sslkey=a.key&sslpassword=hunter2",
]


@pytest.mark.parametrize("store", PASSWORDS)
def test_a_password_in_the_address_of_the_store_is_refused_and_not_repeated(store: str) -> None:
    message = refusal({"models": [MODEL], "store": store})
    for word in ("store", "PGPASSWORD", "PGPASSFILE"):
        assert word in message
    assert "hunter2" not in message


@pytest.mark.parametrize("store", ["postgresql://ann:hunter2@db:port/stack", "://ann:hunter2@db/stack"])
def test_an_address_of_the_store_that_is_none_is_refused_and_not_repeated(store: str) -> None:
    message = refusal({"models": [MODEL], "store": store})
    assert "postgresql://USER@HOST/NAME" in message
    assert "hunter2" not in message


def test_a_config_survives_the_way_to_a_driver() -> None:
    config = Config.parse({"models": [MODEL | {"engine": {"enforce_eager": True}}]}, "test")
    assert Config.parse(json.loads(json.dumps(config.model_dump(mode="json"))), "test") == config


def test_the_config_is_the_args_of_the_gateway(tmp_path: Path) -> None:
    other = {"name": "small", "args": {"model": MODEL}}
    file = written(tmp_path, {"applications": [other, {"name": GATEWAY, "args": {"models": [MODEL]}}]})
    assert Config.from_file(file) == Config.parse({"models": [MODEL]}, "test")


def test_a_wrong_key_in_a_file_is_told_with_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, {"applications": [{"name": GATEWAY, "args": {"models": [MODEL], "stor": 1}}]})
    with pytest.raises(BadInput) as caught:
        Config.from_file(file)
    for word in (str(file), GATEWAY, "'stor'", "allowed: store"):
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"applications: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"", "has no list `applications`"),
        (b"just text", "has no list `applications`"),
        (b"applications: gateway", "has no list `applications`"),
        (b"applications: []", "has no application named 'gateway'"),
        (b"applications: [gateway, {name: small}]", "has no application named 'gateway'"),
        (b"applications: [{name: gateway}]", "models: is required"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_the_reason(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "stack.yaml"
    file.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        Config.from_file(file)
    assert str(file) in caught.value.message
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{tmp_path}/none.yaml cannot be read: No such file"):
        Config.from_file(tmp_path / "none.yaml")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=str(tmp_path)):
        Config.from_file(tmp_path)


def test_the_environment_names_a_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, {"applications": [{"name": GATEWAY, "args": {"models": [MODEL]}}]})
    monkeypatch.setenv("STACK_CONFIG", str(file))
    assert Config.from_environment() == Config.parse({"models": [MODEL]}, "test")


def test_the_environment_holds_a_config(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.parse({"models": [MODEL], "store": "other.db"}, "test")
    monkeypatch.setenv("STACK_CONFIG", json.dumps(config.model_dump(mode="json")))
    assert Config.from_environment() == config


@pytest.mark.parametrize("value", ["{", '{"models": []}'], ids=["cut off", "no models"])
def test_a_wrong_config_in_the_environment_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("STACK_CONFIG", value)
    with pytest.raises(BadInput, match=r"^STACK_CONFIG"):
        Config.from_environment()


def test_without_anything_in_the_environment_it_is_the_local_one(home: Path) -> None:
    assert Config.from_environment() == Config.from_file(DEFAULT_FILE)


def test_the_local_config_serves_every_one_of_its_models() -> None:
    document = yaml.safe_load(DEFAULT_FILE.read_text())
    config = Config.from_file(DEFAULT_FILE)
    applications = {application["name"]: application for application in document["applications"]}
    assert applications[GATEWAY]["import_path"] == "serve_apps.gateway:build"
    assert set(applications) == {GATEWAY, *(model.id for model in config.all_models)}
    for embedding_model in config.embedding_models:
        application = applications[embedding_model.id]
        assert application["import_path"] == "serve_apps.embeddings:build"
        assert application["route_prefix"] is None, "only the gateway is public"
        assert EmbeddingModel.model_validate(application["args"]["model"]) == embedding_model
    for reward_model in config.reward_classifiers:
        application = applications[reward_model.id]
        assert application["import_path"] == "serve_apps.classifiers:build"
        assert application["route_prefix"] is None, "only the gateway is public"
        assert RewardModel.model_validate(application["args"]["model"]) == reward_model
        assert (reward_model.folder / "head.json").is_file(), "it comes with the stack"
    for model in config.models:
        application = applications[model.id]
        assert application["import_path"] == "serve_apps.llm:build"
        assert application["route_prefix"] is None, "only the gateway is public"
        assert LanguageModel.model_validate(application["args"]["model"]) == model
        assert application["args"]["artifacts"] == config.artifacts


def test_the_bounds_of_agents_have_defaults_and_servers_of_tools_are_named() -> None:
    servers = {
        "files": {"type": "stdio", "command": ["files-server", "--root", "/srv"], "variables": ["FILES_KEY"]},
        "search": {"type": "http", "address": "https://mcp.example.com/mcp?a=b", "token": "SEARCH_TOKEN"},
    }
    agents = Config.parse({"models": [MODEL], "agents": {"max_steps": 5, "mcp_servers": servers}}, "stack.yaml").agents
    assert (agents.max_steps, agents.max_tool_calls, agents.max_queued_turns, agents.photogen) == (5, 50, 16, None)
    dumped = agents.model_dump()["mcp_servers"]
    assert dumped == servers


@pytest.mark.parametrize(
    ("agents", "words"),
    [
        ({"max_steps": 0}, ["agents.max_steps", "greater than or equal to 1", "not 0"]),
        ({"max_queued_turns": 1_001}, ["agents.max_queued_turns", "1000"]),
        ({"mcp_servers": {"a b": {"type": "http", "address": "https://a.com"}}}, ["agents.mcp_servers", "pattern"]),
        ({"mcp_servers": {"a": {"type": "stdio", "command": []}}}, ["agents.mcp_servers.a", "at least 1"]),
        ({"mcp_servers": {"a": {"type": "http", "address": "https://me:hush@a.com"}}}, ["address", "pattern"]),
        ({"mcp_servers": {"a": {"type": "http", "address": "https://a.com", "token": "a-b"}}}, ["token", "pattern"]),
    ],
)
def test_bounds_of_agents_that_cannot_be_are_named(agents: dict[str, Any], words: list[str]) -> None:
    said = refusal({"models": [MODEL], "agents": agents})
    assert [word for word in words if word not in said] == []
