"""What `kubectl kustomize FOLDER` makes of a folder, as far as the kustomization files here use it.

The tests have no kubectl: this follows the files' own entries, and refuses an entry that it does not know.
"""

import re
from pathlib import Path
from typing import Any

import yaml

KEYS = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "replacements"}
NO_SUFFIX = {"disableNameSuffixHash": True}


def built(folder: Path) -> list[dict[str, Any]]:
    """The objects of a folder's kustomization.yaml.

    Raises AssertionError, ValueError or KeyError where kustomize would refuse it, and where a replacement finds no
    object, which kustomize passes over.
    """
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert not set(told) - KEYS, f"not known here: {set(told) - KEYS}"
    objects: list[dict[str, Any]] = []
    for name in told.get("resources", []):
        path = folder / name
        objects += built(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for entry in told.get("configMapGenerator", []):
        assert set(entry) == {"name", "files", "options"}, entry
        assert entry["options"] == NO_SUFFIX, entry
        data = {name: (folder / name).read_text() for name in entry["files"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data})
    if "namespace" in told:
        for one in objects:
            if one["kind"] != "Namespace":
                one["metadata"]["namespace"] = told["namespace"]
    for entry in told.get("replacements", []):
        assert set(entry) == {"source", "targets"}, entry
        holder, key = _field(_selected(objects, entry["source"], {"fieldPath"}), entry["source"]["fieldPath"])
        for target in entry["targets"]:
            assert set(target) == {"select", "fieldPaths"}, target
            one = _selected(objects, target["select"], set())
            for path in target["fieldPaths"]:
                part, last = _field(one, path)
                part[last] = holder[key]
    return objects


def _selected(objects: list[dict[str, Any]], by: dict[str, str], others: set[str]) -> dict[str, Any]:
    """The one object of a kind and name. `others` are what the selector says besides."""
    assert set(by) - others == {"kind", "name"}, by
    (one,) = (one for one in objects if (one["kind"], one["metadata"]["name"]) == (by["kind"], by["name"]))
    return one


def _field(one: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """What holds the field of a path, `a.b` or `a.[b.c]`, and the field's key; it must be there."""
    *steps, last = (bracketed or plain for bracketed, plain in re.findall(r"\[([^\]]+)\]|([^.\[\]]+)", path))
    for step in steps:
        one = one[step]
    assert last in one, f"there is no {path} to replace"
    return one, last
