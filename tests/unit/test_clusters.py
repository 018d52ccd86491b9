"""The files of clusters/ for `ray up`: Ray takes them, what is served finds its nodes, and Ray is locked."""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from moto import mock_aws
from packaging.requirements import Requirement
from ray._private.label_utils import parse_node_labels_string
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.docker import with_docker_exec
from ray.autoscaler._private.util import hash_runtime_conf, prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from scripts.local_stack import read_serve_file
from serve_apps.placement import NOT_HEAD, NOT_SPOT, WAITS
from stack import engines
from stack.config import ROOT, Config, LanguageModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray.serve.schema import ServeDeploySchema

    from serve_apps.session_pool import MEMORY_BYTES

CLUSTERS = ROOT / "clusters"
LOCAL = CLUSTERS / "local.yaml"
CLOUDS = [CLUSTERS / "aws.yaml", CLUSTERS / "gcp.yaml"]
FILES = [LOCAL, *CLOUDS]
SERVE_FILE = ROOT / "serve_apps" / "cluster.yaml"
ENVIRONMENT = CLUSTERS / "environment.sh"
SPOT, ON_DEMAND = {"ray.io/market-type": "spot"}, {"ray.io/market-type": "on-demand"}
# What the clouds say of the machines of theirs that have no word of it in Ray.
MACHINES_GIB = {"n2-standard-32": 128, "a3-highgpu-8g": 1872}
SECRETS = re.compile(r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|(?:password|secret|token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{8,}", re.I)

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
every_cloud = pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
every_gpu_config = pytest.mark.parametrize(
    "serve_file", [SERVE_FILE, SERVE_FILE.with_name("gpu.yaml")], ids=lambda file: file.name
)


def read(file: Path) -> dict[str, Any]:
    cluster = yaml.safe_load(file.read_text())
    assert isinstance(cluster, dict)
    return cluster


def starts(cluster: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The arguments of the two `ray start`, by head and worker."""
    found = {}
    for kind in ("head", "worker"):
        (command,) = (one for one in cluster[f"{kind}_start_ray_commands"] if "ray start" in one)
        words = shlex.split(re.sub(r"\$\([^()]*(?:\([^()]*\)[^()]*)*\)", "SHELL", command.partition("ray start")[2]))
        found[kind] = {name: value for name, _, value in (word.partition("=") for word in words)}
    return found


def node_types(cluster: dict[str, Any], labels: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    types: dict[str, dict[str, Any]] = cluster["available_node_types"]
    workers = {name: one for name, one in types.items() if name != cluster["head_node_type"]}
    return {name: one for name, one in workers.items() if labels in (None, one["labels"])}


def fits(bundles: list[dict[str, float]], resources: dict[str, float]) -> bool:
    total = {name: sum(bundle.get(name, 0) for bundle in bundles) for bundle in bundles for name in bundle}
    return all(resources.get(name, 0) >= amount for name, amount in total.items())


# What Ray says of them


@every_file
def test_ray_takes_the_file(file: Path) -> None:
    """As `ray up` does it: its schema, its defaults, and its checks of the whole."""
    cluster = prepare_config(read(file))
    validate_config(cluster)
    workers = [
        one
        for name, one in cluster["available_node_types"].items()
        if len(cluster["available_node_types"]) == 1 or name != cluster["head_node_type"]
    ]
    assert sum(one["max_workers"] for one in workers) == cluster["max_workers"] == read(file)["max_workers"]


@every_file
def test_ray_refuses_the_file_with_a_key_that_it_does_not_know(file: Path) -> None:
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config(read(file) | {"max_worker": 1}))


@every_file
def test_the_mounted_files_are_there_and_are_not_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hashes all that is in them, here and on the head."""
    monkeypatch.chdir(ROOT)
    mounts = read(file)["file_mounts"]
    ours = {there: here for there, here in mounts.items() if not here.startswith("~")}
    assert all(Path(here).exists() and not (Path(here) / ".venv").exists() for here in ours.values())
    assert set(ours.values()).isdisjoint({".", ".git", ".venv"})
    assert all(there == f"~/llama-stack-ray/{here}" for there, here in ours.items())
    assert hash_runtime_conf(ours, None, {})


def test_the_hosts_get_all_that_setting_up_and_serving_needs() -> None:
    mounted = set(read(LOCAL)["file_mounts"].values())
    project = (ROOT / "pyproject.toml").read_text()
    assert {"stack", "serve_apps", "jobs", "scripts", "clusters", "pyproject.toml"} <= mounted
    assert 'readme = "README.md"' in project
    assert {"README.md", "LICENSE"} <= mounted, "the package is built with them"


# What is served on them


def test_the_serve_file_of_clusters_is_a_serve_file_whose_parts_fit() -> None:
    file = read_serve_file(SERVE_FILE)
    ServeDeploySchema.model_validate(file.document)
    assert (file.host, file.port) == ("0.0.0.0", 8321)
    assert file.document["proxy_location"] == "EveryNode"


def test_two_gateways_are_on_two_nodes() -> None:
    gateway = next(one for one in read(SERVE_FILE)["applications"] if one["name"] == "gateway")
    (deployment,) = gateway["deployments"]
    assert (deployment["name"], deployment["num_replicas"], deployment["max_replicas_per_node"]) == ("Gateway", 2, 1)
    for file in CLOUDS:
        assert read(file)["available_node_types"]["cpu"]["min_workers"] >= 2, "one may be lost"


@every_cloud
@every_gpu_config
def test_every_model_fits_a_kind_of_node_that_is_no_spot_node(file: Path, serve_file: Path) -> None:
    serving = node_types(read(file), ON_DEMAND)
    for model in Config.from_file(serve_file).all_models:
        bundles = engines.bundles(model) if isinstance(model, LanguageModel) else [{"CPU": model.cpus}]
        assert any(fits(bundles, one["resources"]) for one in serving.values()), model.id


@every_cloud
@every_gpu_config
def test_the_nodes_hold_the_most_replicas_of_all_models_at_once(file: Path, serve_file: Path) -> None:
    serving = node_types(read(file), ON_DEMAND)
    gpus = sum(one["resources"].get("GPU", 0) * one["max_workers"] for one in serving.values())
    asked = sum(model.gpus * model.most_replicas for model in Config.from_file(serve_file).models)
    assert 0 < asked <= gpus


@every_cloud
def test_trainings_have_spot_nodes_that_come_before_those_that_serve(file: Path) -> None:
    cluster = read(file)
    spot, serving = node_types(cluster, SPOT), node_types(cluster, ON_DEMAND)
    assert all(one["resources"]["GPU"] > 0 and one["min_workers"] == 0 for one in spot.values())
    assert min(one["priority"] for one in spot.values()) > max(one.get("priority", 0) for one in serving.values())
    for one in spot.values():
        assert "spot" in str(one["node_config"]).lower(), "the cloud is told, too"
    for one in serving.values():
        assert "spot" not in str(one["node_config"]).lower()
    (kind,), (node,) = Config.from_file(SERVE_FILE).autoscaled_nodes, spot.values()
    assert kind.most == node["max_workers"], "what jobs are handed to Ray for"
    assert fits([kind.resources], node["resources"])
    training = engines.bundles_of_job(Config.from_file(SERVE_FILE).models[1])
    assert any(fits(training, one["resources"]) for one in spot.values())


@every_cloud
def test_a_container_gets_gpus_where_there_are_some(file: Path) -> None:
    """NVIDIA's runtime brings in what these variables name, and fails where it is to and there is no GPU."""
    config = AutoscalingConfig(read(file), skip_content_hash=True)
    asked = {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"}
    for name, one in read(file)["available_node_types"].items():
        docker = config.get_docker_config(name)
        options = docker["run_options"] + docker.get("worker_run_options", [])
        words = shlex.split(" ".join(options))
        given = {words[n + 1] for n, word in enumerate(words) if word == "--env" and "NVIDIA" in words[n + 1]}
        assert given == (asked if one["resources"].get("GPU") else set()), name
        assert not docker.get("disable_automatic_runtime_detection"), "Ray sets the runtime"
        assert "head_run_options" not in docker


def filled_out(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The file as the autoscaler has it: `ray up` adds what AWS says of its machines; of Google's it asks nothing."""
    if cluster["provider"]["type"] == "gcp":
        return cluster
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    with mock_aws():
        filled: dict[str, Any] = AWSNodeProvider.fillout_available_node_types_resources(cluster)
    return filled


@every_cloud
def test_a_node_is_started_for_the_session_that_no_node_has_memory_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = filled_out(read(file), monkeypatch)
    for one in cluster["available_node_types"].values():
        one["min_workers"] = 0
    config = AutoscalingConfig(cluster, skip_content_hash=True)
    elsewhere = NOT_SPOT | NOT_HEAD
    assert (WAITS["num_cpus"], WAITS["label_selector"]) == (0, elsewhere)
    assert all(value.startswith("!") for value in elsewhere.values())
    without = [
        (key, LabelSelectorOperator.LABEL_OPERATOR_NOT_IN, [value.removeprefix("!")])
        for key, value in elsewhere.items()
    ]
    session = ResourceRequestUtil.make({"memory": MEMORY_BYTES}, label_selectors=[without])
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([session]),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert not reply.infeasible_resource_requests
    assert [(one.instance_type, one.count) for one in reply.to_launch if one.instance_type != "head"] == [("cpu", 1)]


def test_on_google_cloud_every_node_says_what_memory_it_has() -> None:
    """The same share as of AWS's, where Ray itself says it."""
    for one in node_types(read(CLUSTERS / "gcp.yaml")).values():
        machine = MACHINES_GIB[one["node_config"]["machineType"]] * 2**30
        assert one["resources"]["memory"] == int(machine * (1 - DEFAULT_OBJECT_STORE_MEMORY_PROPORTION))


@every_cloud
def test_clouds_grow_and_shrink(file: Path) -> None:
    cluster = read(file)
    workers = node_types(cluster)
    assert sum(one["max_workers"] for one in workers.values()) == cluster["max_workers"]
    assert all(one["min_workers"] < one["max_workers"] for one in workers.values())
    assert cluster["idle_timeout_minutes"] > 0


@every_file
def test_the_head_does_no_gpu_work_and_takes_no_tasks(file: Path) -> None:
    cluster = read(file)
    if file == LOCAL:
        assert (starts(cluster)["head"]["--num-cpus"], starts(cluster)["head"]["--num-gpus"]) == ("0", "0")
    else:
        assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}


@every_file
def test_the_head_is_told_from_the_nodes_that_serve(file: Path) -> None:
    cluster = read(file)
    if file == LOCAL:
        labels = {kind: parse_node_labels_string(one.get("--labels", "")) for kind, one in starts(cluster).items()}
        head, others = labels["head"], [labels["worker"]]
    else:
        head = cluster["available_node_types"][cluster["head_node_type"]]["labels"]
        others = [one["labels"] for one in node_types(cluster).values()]
    assert {key: f"!{head[key]}" for key in NOT_HEAD} == NOT_HEAD
    assert not any(NOT_HEAD.keys() & one.keys() for one in others)


@every_cloud
@pytest.mark.parametrize(("owner", "given"), [(0, True), (1000, False)])
def test_a_new_file_system_is_given_to_the_images_user(file: Path, owner: int, given: bool, tmp_path: Path) -> None:
    (user,) = re.findall(r"useradd .*--uid (\d+)", (CLUSTERS / "Containerfile").read_text())
    *_, mounted, command = read(file)["initialization_commands"]
    assert "sudo mount" in mounted
    programs = {"sudo": 'echo "$@"', "stat": f"echo {owner}"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = subprocess.run(["bash", "-c", command], env={"PATH": path}, capture_output=True, text=True, check=True)
    assert ran.stdout == (f"chown {user}:{user} /mnt/stack\n" if given else "")


@every_cloud
@pytest.mark.parametrize(("uid", "fails"), [(1000, False), (1001, True)])
def test_a_node_whose_secrets_the_images_user_could_not_read_is_given_up_with_a_word(
    file: Path, uid: int, fails: bool, tmp_path: Path
) -> None:
    (user,) = re.findall(r"useradd .*--uid (\d+)", (CLUSTERS / "Containerfile").read_text())
    command = read(file)["initialization_commands"][0]
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {uid}\n")
    (tmp_path / "id").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = subprocess.run(["bash", "-c", command], env={"PATH": path}, capture_output=True, text=True)
    assert ran.returncode == int(fails)
    assert (f"the uid {user}" in ran.stdout and f"it has {uid}" in ran.stdout) is fails


@every_cloud
def test_a_node_logs_in_to_the_registry_of_the_image(file: Path) -> None:
    cluster = read(file)
    registry, _, image = cluster["docker"]["image"].partition("/")
    (login,) = (one for one in cluster["initialization_commands"] if "docker" in one)
    assert login.split()[-1] == registry
    assert cluster["provider"]["region"] in registry
    assert re.search(r":[\w.-]+$", image), "each has a tag of its own"
    assert cluster["docker"]["pull_before_run"] is False, "a login may have ended when `ray up` is run again"


def test_on_google_cloud_every_disk_is_of_a_kind_that_all_machines_take() -> None:
    """Of A3, Google's own pd-standard is refused."""
    cluster = read(CLUSTERS / "gcp.yaml")
    kind = f"zones/{cluster['provider']['availability_zone']}/diskTypes/pd-balanced"
    for one in cluster["available_node_types"].values():
        assert [disk["initializeParams"]["diskType"] for disk in one["node_config"]["disks"]] == [kind]


# How Ray is locked


def environment_of(cluster: dict[str, Any]) -> dict[str, str]:
    """What Ray's processes find in their environment."""
    if "docker" in cluster:
        options = shlex.split(" ".join(cluster["docker"]["run_options"]))
        pairs = [options[n + 1] for n, word in enumerate(options) if word == "--env"]
    else:
        pairs = re.findall(r"^export (\S+=.*)$", ENVIRONMENT.read_text(), re.M)
        for kind in ("head", "worker"):
            commands = [one for one in cluster[f"{kind}_start_ray_commands"] if re.search(r"\bray (start|stop)", one)]
            assert "ray stop" in commands[0]
            assert "ray start" in commands[-1]
            assert all(one.startswith(". ~/llama-stack-ray/clusters/environment.sh;") for one in commands)
    return {name: value.strip('"') for name, _, value in (pair.partition("=") for pair in pairs)}


@every_file
def test_ray_asks_for_a_token_that_is_mounted(file: Path) -> None:
    cluster = read(file)
    environment = environment_of(cluster)
    assert environment["RAY_AUTH_MODE"] == "token"
    home = "/home/stack" if "docker" in cluster else "$HOME"
    assert environment["RAY_AUTH_TOKEN_PATH"] == f"{home}/secrets/auth_token"
    assert environment["PGPASSFILE"] == f"{home}/secrets/pgpass"
    assert cluster["file_mounts"]["~/secrets"] == "~/.config/llama-stack-ray"
    assert environment["STACK_HOME"] == "/mnt/stack"
    assert environment["STACK_CONFIG"].endswith("/serve_apps/cluster.yaml")


@every_cloud
def test_the_database_of_a_cloud_is_known_by_its_certificate(file: Path) -> None:
    """libpq's own default asks for none, and goes on in the clear."""
    cluster = read(file)
    environment = environment_of(cluster)
    assert environment["PGSSLMODE"] == {"aws": "verify-full", "gcp": "verify-ca"}[cluster["provider"]["type"]]
    assert environment["PGSSLROOTCERT"] == "/home/stack/secrets/database-ca.pem"


@every_file
def test_no_port_of_rays_is_open_to_more_than_the_nodes(file: Path) -> None:
    cluster = read(file)
    started = starts(cluster)
    assert started["head"]["--dashboard-host"] == "127.0.0.1"
    for arguments in started.values():
        assert not any("0.0.0.0" in value or "::" in value for value in arguments.values())
    if file == LOCAL:
        assert started["head"]["--node-ip-address"] == cluster["provider"]["head_ip"]
        assert started["worker"]["--node-ip-address"] == "SHELL", "the address that it has towards the head"
    else:
        assert cluster["provider"]["use_internal_ips"] is True
        assert "accessConfigs" not in str(cluster["available_node_types"])


def test_the_hosts_firewall_lets_the_same_hosts_in_and_others_to_the_gateway_alone() -> None:
    rules, provider = (CLUSTERS / "firewall.nft").read_text(), read(LOCAL)["provider"]
    (hosts,) = re.findall(r"^define hosts = \{ (.*) \}$", rules, re.M)
    assert hosts.split(", ") == [provider["head_ip"], *provider["worker_ips"]]
    assert "policy drop" in rules
    assert re.findall(r"^ *tcp dport (.*?) accept", rules, re.M) == [str(read(SERVE_FILE)["http_options"]["port"])]


def test_the_autoscaler_of_hosts_is_the_one_that_knows_their_head() -> None:
    """Ray's second one, which `ray up` sets, has no worker started after it has lost sight of the head."""
    assert "RAY_enable_autoscaler_v2=0" in read(LOCAL)["head_start_ray_commands"][-1]


def test_on_aws_every_node_is_in_a_subnet_that_is_named() -> None:
    """Without one Ray takes any of the account's, which may give every node a public address."""
    for name, one in read(CLUSTERS / "aws.yaml")["available_node_types"].items():
        assert one["node_config"].get("SubnetIds"), name


def test_on_aws_only_the_gateways_port_is_opened() -> None:
    (rule,) = read(CLUSTERS / "aws.yaml")["provider"]["security_group"]["IpPermissions"]
    port = read(SERVE_FILE)["http_options"]["port"]
    assert (rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) == (port, port, "tcp")
    assert all(not one["CidrIp"].startswith("0.") for one in rule["IpRanges"])


@every_cloud
def test_the_head_alone_has_the_rights_to_start_nodes(file: Path) -> None:
    cluster = read(file)
    key = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[cluster["provider"]["type"]]
    head = cluster["available_node_types"][cluster["head_node_type"]]["node_config"][key]
    workers = [one["node_config"][key] for one in node_types(cluster).values()]
    assert "llama-stack-ray-head" in str(head)
    assert all("llama-stack-ray-worker" in str(one) and "head" not in str(one) for one in workers)


@every_file
def test_every_port_is_fixed_and_none_is_taken_twice(file: Path) -> None:
    for kind, arguments in starts(read(file)).items():
        ports = {name: int(value) for name, value in arguments.items() if name.endswith("port")}
        lowest, highest = ports.pop("--min-worker-port"), ports.pop("--max-worker-port")
        fixed = [*ports.values(), read(SERVE_FILE)["http_options"]["port"], 6390]
        assert len(set(fixed)) == len(fixed)
        assert not any(lowest <= port <= highest for port in fixed)
        assert highest - lowest >= 1_000, "one port for each worker process"
        needed = {"--node-manager-port", "--object-manager-port", "--runtime-env-agent-port", "--metrics-export-port"}
        assert needed | {"--dashboard-agent-grpc-port", "--dashboard-agent-listen-port"} <= set(ports), kind


def test_the_head_on_hosts_keeps_what_it_knows_in_its_own_redis_behind_a_password() -> None:
    redis, ray = read(LOCAL)["head_start_ray_commands"][1:]
    assert "bind 127.0.0.1" in redis
    assert "requirepass" in redis
    assert "appendonly yes" in redis
    assert "RAY_REDIS_ADDRESS=127.0.0.1:6390" in ray
    assert starts(read(LOCAL))["head"]["--redis-password"] == "SHELL"


def test_the_hosts_outlast_their_head_for_as_long_as_somebody_takes_to_start_it_again() -> None:
    """On clouds a lost head is not started again: there is no Redis that would know of the nodes."""
    assert float(environment_of(read(LOCAL))["RAY_gcs_rpc_server_reconnect_timeout_s"]) >= 1_800


def test_a_head_is_started_again_with_the_commands_of_ray_up(tmp_path: Path) -> None:
    commands = [
        "printf one >> said",
        """printf ' "%s"\n' "$STACK_HOME" >> said""",
        "cat >> said; false",
        "echo no >> said",
    ]
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps({"head_start_ray_commands": commands}))
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run([CLUSTERS / "start_head.sh"], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == 1, "one that fails is the last"
    assert (tmp_path / "said").read_text() == 'one "/mnt/stack"\n'


def test_the_heads_service_runs_that_as_the_user_of_ray_up() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(CLUSTERS / "head.service")
    user = read(LOCAL)["auth"]["ssh_user"]
    assert unit["Service"]["User"] == user
    assert unit["Service"]["ExecStart"] == f"/home/{user}/llama-stack-ray/clusters/start_head.sh"
    assert unit["Unit"]["ConditionPathExists"] == f"/home/{user}/ray_bootstrap_config.yaml"


def test_a_worker_asks_whether_ray_is_up_before_it_stops_it() -> None:
    (command,) = read(LOCAL)["worker_start_ray_commands"]
    assert command.index("is_up.py $RAY_HEAD_IP && exit;") < command.index("ray stop") < command.index("ray start")


@every_file
def test_dead_nodes_are_noticed_within_a_minute(file: Path) -> None:
    environment = environment_of(read(file))
    period, timeout, checks = (
        int(environment[f"RAY_health_check_{name}"]) for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert (period + timeout) * checks <= 24_000, "what was there has to be started elsewhere within the same minute"


# The image


def test_the_image_is_of_fixed_parts_and_runs_without_rights() -> None:
    lines = (CLUSTERS / "Containerfile").read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    (base,) = (line[1] for line in words if line[0] == "FROM")
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)
    assert [line[1] for line in words if line[0] == "USER"][-1] == "stack"
    assert not {"ENTRYPOINT", "CMD", "ADD"} & {line[0] for line in words}
    text = "\n".join(lines)
    assert '--constraint "$constraints"' in text
    assert "HOME=/home/stack" in text, "by which Ray finds where to put what it mounts"
    for program in ("rsync", "openssh-client", "wget", "gcc"):
        assert program in text


@pytest.mark.parametrize(
    ("cloud", "module", "package"),
    [("aws", "boto3", "boto3"), ("gcp", "googleapiclient", "google-api-python-client")],
)
def test_the_image_has_what_rays_autoscaler_imports_of_a_cloud(cloud: str, module: str, package: str) -> None:
    """The head starts nodes from within its container."""
    provider = Path(ray.__file__).parent / "autoscaler" / "_private" / cloud / "node_provider.py"
    assert re.search(rf"^(import|from) {module}\b", provider.read_text(), re.M)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert package in [Requirement(text).name for text in extras["clouds"]]
    assert "--extra clouds" in (CLUSTERS / "Containerfile").read_text()


@pytest.mark.parametrize("written", [True, False], ids=["as the image has it", "without the image's profile"])
def test_ray_up_finds_ray_in_the_image(written: bool, tmp_path: Path) -> None:
    """By the words of `ray up`, which are run by a login shell, for which Debian's /etc/profile sets PATH anew."""
    text = (CLUSTERS / "Containerfile").read_text()
    (write,) = re.findall(r"^    && (echo .* > /etc/profile\.d/\S+)$", text, re.M)
    profile, home, environment = (tmp_path / name for name in ("profile.d", "home", "bin"))
    for folder in (profile, home, environment):
        folder.mkdir()
    (home / ".bashrc").touch()
    (environment / "ray").write_text("#!/bin/sh\necho ray $1\n")
    (environment / "ray").chmod(0o755)
    if written:
        subprocess.run(["sh", "-c", write.replace("/etc/profile.d", str(profile))], check=True)
    (path,) = re.findall(r"^    PATH=(\S+):\$PATH", text, re.M)
    # Instead of the container: the folders that are the image's, in the places that they have there.
    docker = tmp_path / "docker"
    places = [*("--ro-bind", "/usr", "/usr"), *("--ro-bind", "/etc", "/etc"), *("--dev", "/dev")]
    for name in ("bin", "lib", "lib64", "sbin"):
        places += ["--symlink", f"usr/{name}", f"/{name}"]
    places += [*("--ro-bind", str(profile), "/etc/profile.d"), *("--ro-bind", str(home), "/home/stack")]
    places += [*("--ro-bind", str(environment), path), *("--setenv", "HOME", "/home/stack")]
    places += ["--setenv", "PATH", f"{path}:/usr/local/bin:/usr/bin:/bin"]
    docker.write_text(f'#!/bin/sh\nshift 3\nexec bwrap {shlex.join(places)} "$@"\n')
    docker.chmod(0o755)
    (command,) = with_docker_exec([" ".join(_with_interactive("ray start"))], "stack", str(docker), None, True)
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (ran.stdout, ran.returncode) == (("ray start\n", 0) if written else ("", 127)), ran.stderr


def test_the_image_has_the_code_and_nothing_else_of_the_folder() -> None:
    lines = (CLUSTERS / "Containerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]}
    assert all((ROOT / name).exists() for name in copied)
    everything, *back = (ROOT / ".containerignore").read_text().split()
    let_in = {name.removeprefix("!") for name in back if name.startswith("!")}
    assert everything == "*"
    assert let_in == {name.split("/")[0] for name in copied}
    assert {"stack", "serve_apps", "jobs", "scripts"} <= let_in


@pytest.mark.parametrize("file", [*FILES, ENVIRONMENT, SERVE_FILE], ids=lambda file: file.name)
def test_no_file_holds_a_secret(file: Path) -> None:
    assert not SECRETS.search(file.read_text())
