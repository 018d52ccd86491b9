"""KubeRay's own kinds, as far as the files of clusters/kuberay/ use them, by its API reference (ray.io/v1, 1.7).

What Kubernetes itself defines in them, as the templates of pods, is checked by Kubernetes' own schemas. The operator's
own CRDs say the same at greater length: `python -m tests.kuberay FOLDER` checks the files against those in a folder,
such as helm-chart/kuberay-operator/crds of a release's source.
"""

import sys
from pathlib import Path
from typing import Any, Literal

import jsonschema
import yaml
from pydantic import BaseModel, ConfigDict, Field

from stack.config import ROOT

FOLDER = ROOT / "clusters" / "kuberay"
KINDS = ("RayCluster", "RayJob", "RayService")


class Part(BaseModel):
    """A part without a key that KubeRay does not know: it drops those, and says nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AutoscalerOptions(Part):
    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]  # noqa: N815  # the names are KubeRay's
    idleTimeoutSeconds: int = Field(gt=0)  # noqa: N815
    securityContext: dict[str, Any]  # noqa: N815
    resources: dict[str, Any]


class AuthOptions(Part):
    mode: Literal["disabled", "token"]
    secretName: str  # noqa: N815


class RedisCredential(Part):
    valueFrom: dict[str, Any]  # noqa: N815


class GcsFaultToleranceOptions(Part):
    redisAddress: str  # noqa: N815
    redisPassword: RedisCredential  # noqa: N815


class HeadGroupSpec(Part):
    rayStartParams: dict[str, str]  # noqa: N815
    labels: dict[str, str]
    template: dict[str, Any]


class WorkerGroupSpec(Part):
    groupName: str  # noqa: N815
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=1)  # noqa: N815
    priority: int = 0
    rayStartParams: dict[str, str]  # noqa: N815
    resources: dict[str, str] = {}
    labels: dict[str, str]
    template: dict[str, Any]


class RayClusterSpec(Part):
    rayVersion: str  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: AutoscalerOptions  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None  # noqa: N815
    headGroupSpec: HeadGroupSpec  # noqa: N815
    workerGroupSpecs: list[WorkerGroupSpec] = Field(min_length=1)  # noqa: N815


class UpgradeStrategy(Part):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Part):
    upgradeStrategy: UpgradeStrategy  # noqa: N815
    rayClusterDeletionDelaySeconds: int = Field(ge=0)  # noqa: N815
    excludeHeadPodFromServeSvc: bool  # noqa: N815
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: RayClusterSpec  # noqa: N815


class RayJobSpec(Part):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]  # noqa: N815
    backoffLimit: int = Field(ge=0)  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: int = Field(ge=0)  # noqa: N815
    activeDeadlineSeconds: int = Field(gt=0)  # noqa: N815
    preRunningDeadlineSeconds: int = Field(ge=1)  # noqa: N815
    rayClusterSpec: RayClusterSpec  # noqa: N815


SPECS: dict[str, type[Part]] = {"RayCluster": RayClusterSpec, "RayJob": RayJobSpec, "RayService": RayServiceSpec}


def documents(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All objects of the files in a folder."""
    return [one for file in sorted(folder.glob("*.yaml")) for one in yaml.safe_load_all(file.read_text())]


def problems(crds: Path) -> list[str]:
    """What the CRDs in a folder find wrong with the files, and each key of ours that they do not know."""
    found = []
    schemas = {
        crd["spec"]["names"]["kind"]: version["schema"]["openAPIV3Schema"]
        for crd in documents(crds)
        for version in crd["spec"]["versions"]
        if version["name"] == "v1"
    }
    for one in documents():
        if one["kind"] not in KINDS:
            continue
        schema = schemas[one["kind"]]
        errors = jsonschema.Draft7Validator(schema).iter_errors(one)
        found += [f"{one['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
        found += [f"{one['kind']} {place}: not known" for place in _unknown(one, schema, "")]
    return found


def _unknown(value: Any, schema: dict[str, Any], place: str) -> list[str]:
    """The places of keys that a schema does not know; Kubernetes would drop them without a word."""
    if isinstance(value, list):
        return [one for n, item in enumerate(value) for one in _unknown(item, schema.get("items", {}), f"{place}[{n}]")]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    lost = [f"{place}.{key}" for key in value if key not in known]
    return lost + [one for key in value if key in known for one in _unknown(value[key], known[key], f"{place}.{key}")]


if __name__ == "__main__":
    for problem in (wrong := problems(Path(sys.argv[1]))):
        print(problem)
    sys.exit(1 if wrong else 0)
