"""The files of clusters/kuberay/: Kubernetes and KubeRay take them, and what they hold together fits."""

import copy
import json
import lzma
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serve_apps.placement import NOT_HEAD
from stack import engines
from stack.api.post_training import PostTrainingSFTRequest
from stack.config import ROOT, Config, LanguageModel
from stack.draining import longest_stream_s
from tests.kuberay import FOLDER, KINDS, crds, documents, problems, written
from tests.kustomize import built

KUBERNETES = "1.34"
SERVE_FILE = ROOT / "serve_apps" / "cluster.yaml"
OBJECTS = documents()
RAY = [one for one in OBJECTS if one["kind"] in KINDS]
SCHEMAS = crds()["schemas"]
OURS = {"app.kubernetes.io/part-of": "llama-stack"}

every_object = pytest.mark.parametrize(
    "one", [one for one in OBJECTS if one["kind"] not in (*KINDS, "Kustomization")], ids=lambda one: one["kind"]
)
every_ray = pytest.mark.parametrize("one", RAY, ids=lambda one: one["kind"])


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = (one for one in OBJECTS if one["kind"] == kind and one["metadata"]["name"] == name)
    return found


def spec_of(one: dict[str, Any]) -> dict[str, Any]:
    """What an object says of its cluster."""
    spec: dict[str, Any] = one["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
    return cluster


def groups_of(one: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in spec_of(one)["workerGroupSpecs"]}


def templates(one: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The templates of a cluster's pods, by group."""
    workers = {name: group["template"] for name, group in groups_of(one).items()}
    return {"head": spec_of(one)["headGroupSpec"]["template"]} | workers


def pods() -> list[tuple[str, str, dict[str, Any]]]:
    """The spec of each pod that there can be: of what, of which group, and what Kubernetes is told."""
    found = [(one["kind"], name, pod["spec"]) for one in RAY for name, pod in templates(one).items()]
    redis = named("StatefulSet", "redis")["spec"]["template"]["spec"]
    return [*found, ("StatefulSet", "redis", redis), ("Pod", "keys", named("Pod", "keys")["spec"])]


every_pod = pytest.mark.parametrize(("kind", "group", "pod"), pods(), ids=lambda value: str(value)[:20])


def ray_resources(group: dict[str, Any]) -> dict[str, float]:
    """What Ray's autoscaler takes a node of a group to have."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    custom = {name: float(amount) for name, amount in group.get("resources", {}).items()}
    return {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))} | custom


# What Kubernetes and KubeRay say of them


@every_object
def test_kubernetes_takes_the_object(one: dict[str, Any]) -> None:
    assert kubernetes_validate.validate(one, KUBERNETES, strict=True)


@every_ray
def test_kuberay_takes_the_object(one: dict[str, Any]) -> None:
    assert one["apiVersion"] == "ray.io/v1"
    assert not list(problems(one, SCHEMAS))
    for name, template in templates(one).items():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        assert kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "spce", {}),
        (("spec",), "gcsFaultTolerance", {}),
        (("spec", "workerGroupSpecs", 0), "minReplicas", "2"),
        (("spec", "workerGroupSpecs", 0), "minReplica", 2),
        (("spec", "autoscalerOptions"), "upscalingMode", "Fast"),
        (("spec", "headGroupSpec", "template", "spec"), "nodeSelektor", {}),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "requests"), "cpu", "many"),
    ],
)
def test_what_kuberay_does_not_take_is_noticed(place: tuple[str | int, ...], key: str, value: Any) -> None:
    part = one = copy.deepcopy(named("RayCluster", "stack"))
    for step in place:
        part = part[step]  # type: ignore[index]
    part[key] = value
    (found,) = problems(one, SCHEMAS)
    assert key in found


def test_the_schemas_are_those_of_a_release_and_of_all_that_kuberay_reads(tmp_path: Path) -> None:
    assert crds()["version"] == "v1.7.0", "the one that kustomization.yaml and docs/clusters.md name"
    assert re.fullmatch("[0-9a-f]{40}", crds()["commit"])
    assert set(SCHEMAS) == set(KINDS)
    told = {
        "description": "Told.",
        "type": "object",
        "properties": {"description": {"description": "D", "type": "string"}},
    }
    for kind in KINDS:
        versions = [{"name": "v1alpha1"}, {"name": "v1", "schema": {"openAPIV3Schema": told}}]
        crd = {"spec": {"names": {"kind": kind}, "versions": versions}}
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(crd))
    held = json.loads(lzma.decompress(written(tmp_path, "v0", "c")))
    bare = {"type": "object", "properties": {"description": {"type": "string"}}}
    assert held == {"version": "v0", "commit": "c", "licence": "Apache-2.0", "schemas": dict.fromkeys(KINDS, bare)}


def test_a_key_that_kubernetes_does_not_know_in_a_pod_is_noticed() -> None:
    template = {"spec": {"containers": [{"name": "ray", "image": "i", "volumeMount": []}]}}
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}, "template": template}
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_what_is_applied_together_is_there() -> None:
    resources = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert resources[-1] == "../../serve_apps"
    assert all((FOLDER / name).is_file() for name in resources[:-1])
    others = {file.name for file in FOLDER.glob("*.yaml")} - set(resources)
    assert others == {"kustomization.yaml", "cluster.yaml", "keys.yaml", "training.yaml"}


def test_the_first_key_is_made_before_what_needs_it() -> None:
    """A gateway without one does not start, and Serve does not try for ever."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    steps = (
        "kubectl apply -f clusters/kuberay/namespace.yaml",
        "create secret generic stack-database",
        "kubectl apply -n llama-stack -k serve_apps",
        "kubectl create -n llama-stack -f clusters/kuberay/keys.yaml",
        "pod/keys",
        "kubectl exec -n llama-stack keys -- \\\n  python -m stack keys create",
        "kubectl delete -n llama-stack pod keys",
        "\nkubectl apply -k clusters/kuberay\n",
    )
    places = [page.index(step) for step in steps]
    assert places == sorted(places)


def test_keys_are_made_where_the_gateways_look_for_them() -> None:
    """By the same code, config and password, where the database can be reached; and no log holds a key."""
    pod = named("Pod", "keys")
    (container,) = pod["spec"]["containers"]
    head = templates(named("RayService", "stack"))["head"]["spec"]
    (gateways,) = head["containers"]
    assert container["image"] == gateways["image"]
    assert container["volumeMounts"][0] in gateways["volumeMounts"]
    assert pod["spec"]["volumes"][0] in head["volumes"]
    assert {one["name"] for one in container["env"]} == {"STACK_CONFIG", "PGPASSWORD"}
    assert all(one in gateways["env"] for one in container["env"])
    assert pod["metadata"]["labels"] == policies()["ray"]["podSelector"]["matchLabels"]
    assert container["command"] == ["sleep", "infinity"], "a key is shown by `kubectl exec` alone"
    assert pod["spec"]["activeDeadlineSeconds"] > 0


def test_what_is_applied_together_is_built_and_taken() -> None:
    """Kustomize puts the Serve file where KubeRay reads it, as it is, and where pods do; all is in one namespace."""
    objects = built(FOLDER)
    by_name = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    assert len(by_name) == len(objects), "kustomize takes no two objects of a kind and name"
    service = by_name.pop(("RayService", "stack"))
    assert service["spec"]["serveConfigV2"] == SERVE_FILE.read_text()
    assert not list(problems(service, SCHEMAS))
    assert by_name["ConfigMap", "stack-config"]["data"] == {SERVE_FILE.name: SERVE_FILE.read_text()}
    for one in by_name.values():
        assert kubernetes_validate.validate(one, KUBERNETES, strict=True)
    del by_name["Namespace", "llama-stack"]
    assert all(one["metadata"]["namespace"] == "llama-stack" for one in [service, *by_name.values()])


@pytest.mark.parametrize(
    ("was", "is_now", "message"),
    [
        ("[spec.serveConfigV2]", "[spec.serveConfig]", "serveConfig"),
        ("name: stack-config,", "name: stack-conf,", "unpack"),
        ("replacements:", "patches: []\nreplacements:", "patches"),
    ],
)
def test_a_kustomization_that_puts_it_elsewhere_is_noticed(was: str, is_now: str, message: str, tmp_path: Path) -> None:
    for folder in ("clusters/kuberay", "serve_apps"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "clusters/kuberay/kustomization.yaml"
    text = file.read_text()
    assert text.count(was) == 1
    file.write_text(text.replace(was, is_now))
    with pytest.raises((AssertionError, ValueError), match=message):
        built(file.parent)


# What they hold


def test_one_file_says_what_is_served_and_what_all_others_read() -> None:
    """Kustomize makes the Serve file of clusters a ConfigMap, and every pod finds it as STACK_CONFIG."""
    (config,) = yaml.safe_load((SERVE_FILE.with_name("kustomization.yaml")).read_text())["configMapGenerator"]
    assert config["files"] == [SERVE_FILE.name]
    assert config["options"] == {"disableNameSuffixHash": True}, "pods know it by this name"
    for one in RAY:
        for group, template in templates(one).items():
            (container,) = template["spec"]["containers"]
            (read,) = (env["value"] for env in container["env"] if env["name"] == "STACK_CONFIG")
            (volume,) = (
                v["name"] for v in template["spec"]["volumes"] if v.get("configMap") == {"name": config["name"]}
            )
            (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == volume)
            assert set(mount) == {"name", "mountPath"}, "a file alone (subPath) would stay as it was at the pod's start"
            assert read == f"{mount['mountPath']}/{SERVE_FILE.name}", group


def test_the_cluster_on_its_own_has_the_nodes_of_the_service() -> None:
    assert named("RayCluster", "stack")["spec"] == named("RayService", "stack")["spec"]["rayClusterConfig"]


@every_ray
def test_the_version_of_ray_is_the_one_of_the_image(one: dict[str, Any]) -> None:
    assert f'"ray[serve,train,data]=={spec_of(one)["rayVersion"]}"' in (ROOT / "pyproject.toml").read_text()


@every_ray
def test_rays_own_autoscaler_starts_nodes_and_keeps_those_of_gpus_for_a_while(one: dict[str, Any]) -> None:
    assert spec_of(one)["enableInTreeAutoscaling"] is True
    options = spec_of(one)["autoscalerOptions"]
    assert (options["version"], options["upscalingMode"]) == ("v2", "Default")
    assert options["idleTimeoutSeconds"] > 0
    for group in groups_of(one).values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_service_is_upgraded_beside_itself_and_no_client_reaches_its_head() -> None:
    spec = named("RayService", "stack")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["excludeHeadPodFromServeSvc"] is True


def test_the_training_ends_and_so_do_its_nodes() -> None:
    (job,) = (one for one in RAY if one["kind"] == "RayJob")
    assert (job["spec"]["submissionMode"], job["spec"]["backoffLimit"]) == ("HTTPMode", 0)
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    for limit in ("ttlSecondsAfterFinished", "activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        assert job["spec"][limit] > 0


@every_ray
def test_every_model_fits_a_kind_of_node_that_is_no_spot_node(one: dict[str, Any]) -> None:
    if one["kind"] == "RayJob":
        return
    groups = [group for group in groups_of(one).values() if group["labels"]["ray.io/market-type"] == "on-demand"]
    config = Config.from_file(SERVE_FILE)
    for model in config.all_models:
        bundles = engines.bundles(model) if isinstance(model, LanguageModel) else [{"CPU": model.cpus}]
        names = {name for bundle in bundles for name in bundle}
        asked = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}
        assert any(
            all(ray_resources(group).get(name, 0) >= amount for name, amount in asked.items()) for group in groups
        ), model.id
    gpus = sum(ray_resources(group)["GPU"] * group["maxReplicas"] for group in groups)
    assert sum(model.gpus * model.most_replicas for model in config.models) <= gpus


@every_ray
def test_the_head_is_told_from_the_nodes_that_serve(one: dict[str, Any]) -> None:
    head = spec_of(one)["headGroupSpec"]["labels"]
    assert {key: f"!{head[key]}" for key in NOT_HEAD} == NOT_HEAD
    assert not any(NOT_HEAD.keys() & group["labels"].keys() for group in groups_of(one).values())


@every_ray
def test_trainings_have_spot_nodes_that_come_before_those_that_serve(one: dict[str, Any]) -> None:
    groups = groups_of(one)
    training = groups.pop("training")
    assert training["labels"] == {"ray.io/market-type": "spot"}
    assert training["minReplicas"] == 0
    assert all(group["labels"] == {"ray.io/market-type": "on-demand"} for group in groups.values())
    assert all(training["priority"] > group.get("priority", 0) for group in groups.values())
    (kind,) = Config.from_file(SERVE_FILE).autoscaled_nodes
    assert kind.most == training["maxReplicas"]
    assert all(ray_resources(training)[name] >= least for name, least in kind.resources.items())


@every_ray
def test_the_head_does_no_gpu_work_and_takes_no_tasks(one: dict[str, Any]) -> None:
    assert spec_of(one)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert "nvidia.com/gpu" not in str(spec_of(one)["headGroupSpec"]["template"])


def test_the_training_is_a_request_of_the_stack_for_a_model_that_it_serves() -> None:
    (config,) = (one for one in OBJECTS if one["kind"] == "ConfigMap")
    request = PostTrainingSFTRequest.model_validate(yaml.safe_load(config["data"]["request.yaml"]))
    assert request.model in [model.id for model in Config.from_file(SERVE_FILE).models]
    job = named("RayJob", request.job_uuid)
    mounts = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    (mount,) = (mount for mount in mounts if mount["name"] == "request")
    assert job["spec"]["entrypoint"].endswith(f"--config {mount['mountPath']}/request.yaml")
    training = groups_of(job)["training"]
    assert request.training_config.workers <= training["maxReplicas"] * ray_resources(training)["GPU"]


def test_each_training_has_a_request_of_its_own() -> None:
    """Another name for the job, wherever it stands, makes another job that reads another request."""
    text = (FOLDER / "training.yaml").read_text().replace("tune-8b-1", "tune-8b-2")
    config, job = yaml.safe_load_all(text)
    assert config["metadata"]["name"] == job["metadata"]["name"] == "tune-8b-2"
    assert yaml.safe_load(config["data"]["request.yaml"])["job_uuid"] == "tune-8b-2"
    volumes = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "request", "configMap": {"name": "tune-8b-2"}} in volumes
    page = (ROOT / "docs" / "clusters.md").read_text()
    assert "sed s/tune-8b-1/tune-8b-2/ clusters/kuberay/training.yaml | kubectl create -n llama-stack -f -" in page


# What is lost when, and what is not


@every_ray
def test_heads_keep_what_they_know_in_redis_and_their_nodes_wait_for_them(one: dict[str, Any]) -> None:
    if one["kind"] == "RayJob":  # it is lost with its head, and the stack tries again on its own nodes
        assert "gcsFaultToleranceOptions" not in spec_of(one)
        return
    host, _, port = spec_of(one)["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert named("Service", host)["spec"]["ports"] == [{"name": "redis", "port": int(port)}]
    for template in templates(one).values():
        environment = {env["name"]: env.get("value") for env in template["spec"]["containers"][0]["env"]}
        assert environment["RAY_gcs_rpc_server_reconnect_timeout_s"] == "1800", "as on hosts (environment.sh)"


def test_redis_is_on_disk_and_asks_for_its_password() -> None:
    redis = named("StatefulSet", "redis")["spec"]
    args = redis["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("--appendonly") + 1] == "yes"
    assert args[args.index("--requirepass") + 1] == "$(REDISCLI_AUTH)"
    assert redis["volumeClaimTemplates"]


def budgeted(labels: dict[str, str]) -> list[str]:
    """The disruption budgets that hold for a pod with such labels."""
    budgets = (one for one in OBJECTS if one["kind"] == "PodDisruptionBudget")
    return [
        one["metadata"]["name"] for one in budgets if one["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ]


@every_ray
def test_every_kind_of_pod_that_serves_is_left_by_disruptions(one: dict[str, Any]) -> None:
    """And no other: a head of a training that stays would let the one of what serves be taken."""
    found = {}
    for name, template in templates(one).items():
        group, kind = ("headgroup", "head") if name == "head" else (name, "worker")
        added = {"ray.io/group": group, "ray.io/node-type": kind}  # by KubeRay
        found[name] = budgeted(template["metadata"]["labels"] | added)
        if name == "head":  # the pod that empties Redis when a cluster ends is made from the head's, and may be taken
            assert not budgeted(template["metadata"]["labels"] | {"ray.io/node-type": "redis-cleanup"})
    if one["kind"] == "RayJob":
        assert found == {"head": [], "training": []}
    else:
        assert found == {"head": ["ray-head"], "cpu": ["ray-cpu"], "serving": ["ray-serving"], "training": []}


def test_a_node_is_emptied_as_the_page_says() -> None:
    """Of pods of KubeRay, Kubernetes takes only a number that must stay: one that is alone is deleted by hand."""
    budgets = {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "PodDisruptionBudget"}
    assert set(budgets) == {"ray-head", "ray-cpu", "ray-serving", "redis"}
    assert all(set(budget) == {"minAvailable", "selector"} for budget in budgets.values())
    assert budgets["redis"]["selector"] == named("StatefulSet", "redis")["spec"]["selector"]
    groups = groups_of(named("RayService", "stack"))
    numbers = {f"ray-{name}": groups[name]["minReplicas"] for name in ("cpu", "serving")} | {"ray-head": 1}
    numbers["redis"] = named("StatefulSet", "redis")["spec"]["replicas"]
    assert all(numbers[name] >= budget["minAvailable"] for name, budget in budgets.items())
    waiting = {name for name, budget in budgets.items() if numbers[name] == budget["minAvailable"]}
    assert waiting == {"ray-head", "ray-serving", "redis"}
    page = " ".join((ROOT / "docs" / "clusters.md").read_text().split())
    assert "of a head, of Redis and of the only node `serving`: `kubectl drain` would wait for ever" in page


def test_draining_outlasts_the_longest_stream() -> None:
    longest = longest_stream_s(Config.from_file(SERVE_FILE))
    service = named("RayService", "stack")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > longest
    for name, template in templates(service).items():
        if name in ("head", "training"):
            continue
        hook = template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[:4] == ["python", "-m", "scripts.drain_node", "--seconds"]
        # A replica is first started elsewhere, and only then does this one end what it has begun.
        assert longest + 300 < int(hook[4]) < template["spec"]["terminationGracePeriodSeconds"]


# How it is locked


@every_ray
def test_ray_asks_for_a_token(one: dict[str, Any]) -> None:
    assert spec_of(one)["authOptions"] == {"mode": "token", "secretName": "ray-token"}


@every_pod
def test_no_container_has_a_right_that_it_does_not_need(kind: str, group: str, pod: dict[str, Any]) -> None:
    """As the namespace demands it: Kubernetes' own level `restricted`."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not any("hostPath" in volume for volume in pod.get("volumes", []))
    # KubeRay's autoscaler, in the head's pod, is the only one that talks to Kubernetes.
    assert group == "head" or pod["automountServiceAccountToken"] is False


@every_pod
def test_every_image_of_the_stack_is_one_that_may_be_in_a_private_registry(
    kind: str, group: str, pod: dict[str, Any]
) -> None:
    """The secret is only needed there: kubelets pull without one that does not exist."""
    assert kind == "StatefulSet" or pod["imagePullSecrets"] == [{"name": "registry"}]
    (built,) = re.findall("podman build .* -t (.*-gpu) .", (ROOT / "clusters" / "Containerfile").read_text())
    (container,) = pod["containers"]
    assert container["image"] == ("redis:7.4-bookworm" if kind == "StatefulSet" else built)


@every_pod
def test_every_pod_has_its_state_elsewhere(kind: str, group: str, pod: dict[str, Any]) -> None:
    if group in ("redis", "keys"):
        return
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claim = volumes["stack-files"]["persistentVolumeClaim"]["claimName"]
    assert named("PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"]
    (container,) = pod["containers"]
    home = next(one["value"] for one in container["env"] if one["name"] == "STACK_HOME")
    assert {"name": "stack-files", "mountPath": home} in container["volumeMounts"]


def test_secrets_are_named_and_never_contained() -> None:
    assert not [one for one in OBJECTS if one["kind"] == "Secret"]
    text = "".join(file.read_text() for file in FOLDER.glob("*.yaml"))
    named_here = set(
        re.findall(r"secretKeyRef: \{name: ([\w-]+)|secretRef: \{name: ([\w-]+)|secretName: ([\w-]+)", text)
    )
    assert {name for names in named_here for name in names if name} == {
        "ray-token",
        "redis-password",
        "stack-database",
        "stack-storage",
    }
    for _, _, pod in pods():
        for container in pod["containers"]:
            for one in container["env"]:
                secret = re.search("PASS|AUTH|TOKEN|SECRET|KEY", one["name"])
                assert ("valueFrom" in one) == bool(secret), one["name"]


def policies() -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "NetworkPolicy"}


def test_nobody_may_talk_to_anybody_but_as_is_said() -> None:
    assert policies()["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for one in RAY:
        for template in templates(one).values():
            assert template["metadata"]["labels"].items() >= OURS.items()
    assert policies()["ray"]["podSelector"]["matchLabels"] == OURS


def test_from_elsewhere_only_the_gateways_port_answers() -> None:
    """Beside Ray's own pods, the operator, which asks the dashboard, and Prometheus."""
    port = yaml.safe_load(SERVE_FILE.read_text())["http_options"]["port"]
    inside, operator, clients, prometheus = policies()["ray"]["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": OURS}}]}
    # The label that both the chart of KubeRay 1.7 and its config/manager give: their app.kubernetes.io/name differ.
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    assert [one["port"] for one in operator["ports"]] == [8265, port]
    assert [one["port"] for one in clients["ports"]] == [port]
    assert prometheus["from"] == [{"namespaceSelector": {"matchLabels": {"llama-stack/metrics": "true"}}}]
    assert [one["port"] for one in prometheus["ports"]] == [8080, port]
    for one in RAY:
        head = spec_of(one)["headGroupSpec"]
        started = [group["rayStartParams"] for group in (head, *groups_of(one).values())]
        assert not any("metrics-export-port" in params for params in started), "KubeRay's own is 8080"
    for _, group, pod in pods():
        ports = {one["name"]: one["containerPort"] for one in pod["containers"][0].get("ports", [])}
        assert ports.get("serve", port) == port, group
        assert 10001 not in ports.values(), "Ray's client, which nobody needs: the head's service would have it"


def test_the_clusters_are_gone_before_redis_and_their_namespace_go() -> None:
    """KubeRay's finalizer empties Redis by a job, which a namespace that ends does not take."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    steps = (
        "kubectl delete -n llama-stack rayservice stack",
        "kubectl wait -n llama-stack --for=delete raycluster --all",
        "kubectl delete -k clusters/kuberay",
    )
    places = [page.index(step) for step in steps]
    assert places == sorted(places)


def test_only_heads_reach_redis_and_the_clouds_own_keys_are_out_of_reach() -> None:
    (rule,) = policies()["redis"]["ingress"]
    (selector,) = rule["from"][0]["podSelector"]["matchExpressions"]
    assert (selector["key"], selector["values"]) == ("ray.io/node-type", ["head", "redis-cleanup"])
    blocks = [to["ipBlock"] for rule in policies()["ray"]["egress"] for to in rule["to"] if "ipBlock" in to]
    assert all("169.254.0.0/16" in block.get("except", []) for block in blocks if block["cidr"] == "0.0.0.0/0")
