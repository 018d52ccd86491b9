"""KubeRay's own schemas, those of its CRDs (ray.io/v1), for the files of clusters/kuberay/.

They are KubeRay's, under Apache-2.0 (github.com/ray-project/kuberay), without their descriptions, in
kuberay_crds.json.xz, which names the version and the commit that they are of. Made again by

    python -m tests.kuberay FOLDER VERSION COMMIT

from the CRDs in a folder, as helm-chart/kuberay-operator/crds of a release's source. They hold what Kubernetes defines
of pods, too. Rules in CEL, of which those of today concern keys that are not used here, are not looked at.
"""

import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from stack.config import ROOT

FOLDER = ROOT / "clusters" / "kuberay"
KINDS = ("RayCluster", "RayJob", "RayService")
CRDS = Path(__file__).with_name("kuberay_crds.json.xz")


def documents(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All objects of the files in a folder."""
    return [one for file in sorted(folder.glob("*.yaml")) for one in yaml.safe_load_all(file.read_text())]


def crds() -> dict[str, Any]:
    """What the file holds: `version`, `commit`, `licence`, and `schemas` by kind."""
    held = json.loads(lzma.decompress(CRDS.read_bytes()))
    assert isinstance(held, dict)
    return held


def problems(one: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    """What KubeRay would not take of an object, and each key that it does not know: those it drops without a word."""
    schema = _closed(schemas[one["kind"]])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    for error in jsonschema.Draft7Validator(schema).iter_errors(one):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema by which objects have no other keys than those that it names, as Kubernetes reads it."""
    schema = _each(schema, _closed)
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    return schema if is_open or schema.get("type") != "object" else schema | {"additionalProperties": False}


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    return _each({key: value for key, value in schema.items() if key != "description"}, _bare)


def _each(schema: dict[str, Any], change: Any) -> dict[str, Any]:
    """A schema whose parts are changed."""
    changed = {
        key: change(schema[key]) for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)
    }
    if "properties" in schema:
        changed["properties"] = {name: change(part) for name, part in schema["properties"].items()}
    return schema | changed


def written(folder: Path, version: str, commit: str) -> bytes:
    """The file's content, from the CRDs in a folder."""
    schemas = {
        crd["spec"]["names"]["kind"]: _bare(of["schema"]["openAPIV3Schema"])
        for crd in documents(folder)
        for of in crd["spec"]["versions"]
        if crd["spec"]["names"]["kind"] in KINDS and of["name"] == "v1"
    }
    assert set(schemas) == set(KINDS), f"no CRD of {set(KINDS) - set(schemas)} in {folder}"
    held = {"version": version, "commit": commit, "licence": "Apache-2.0", "schemas": schemas}
    return lzma.compress(json.dumps(held, sort_keys=True, separators=(",", ":")).encode(), preset=9)


if __name__ == "__main__":
    CRDS.write_bytes(written(Path(sys.argv[1]), *sys.argv[2:]))
