"""Every operation of the RFC's specification is in our OpenAPI document, with all of its fields."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI

OPERATIONS: dict[str, dict[str, list[str]]] = yaml.safe_load(Path(__file__).with_name("operations.yaml").read_text())


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def test_all_56_operations_are_served_with_their_fields(document: dict[str, Any]) -> None:
    assert len(OPERATIONS) == 56
    assert missing(document) == []


def test_what_is_missing_is_told(document: dict[str, Any]) -> None:
    document = copy.deepcopy(document)
    del document["paths"]["/evaluate/jobs"]["get"]
    parameters = document["paths"]["/datasets/get"]["get"]["parameters"]
    parameters.remove(next(one for one in parameters if one["name"] == "dataset_uuid"))
    del document["components"]["schemas"]["PostTrainingSFTRequest"]["properties"]["algorithm_config"]
    del document["components"]["schemas"]["PostTrainingJob"]["properties"]["job_uuid"]
    assert missing(document) == [
        "GET /datasets/get: its request has no 'dataset_uuid'",
        "GET /evaluate/jobs is not served",
        "POST /post_training/preference_optimize: its response has no 'job_uuid'",
        "POST /post_training/supervised_fine_tune: its request has no 'algorithm_config'",
        "POST /post_training/supervised_fine_tune: its response has no 'job_uuid'",
    ]


def missing(document: dict[str, Any]) -> list[str]:
    """What an OpenAPI document has not of the specification."""
    found = []
    for name, expected in OPERATIONS.items():
        method, path = name.split()
        operation = document["paths"].get(path, {}).get(method.lower())
        if operation is None:
            found.append(f"{name} is not served")
            continue
        served = {"request": _of_request(operation, document), "response": _of_answer(operation, document)}
        for part, fields in expected.items():
            found += [f"{name}: its {part} has no {field!r}" for field in fields if field not in served[part]]
    return found


def _of_request(operation: dict[str, Any], document: dict[str, Any]) -> set[str]:
    query = {one["name"] for one in operation.get("parameters", []) if one["in"] == "query"}
    return query | _of_content(operation.get("requestBody", {}), document)


def _of_answer(operation: dict[str, Any], document: dict[str, Any]) -> set[str]:
    return _of_content(operation["responses"]["200"], document)


def _of_content(described: dict[str, Any], document: dict[str, Any]) -> set[str]:
    return {
        name for media in described.get("content", {}).values() for name in _fields(media.get("schema", {}), document)
    }


def _fields(schema: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    """The names of the fields of an object, of each of several shapes of it, or of the items of a list."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    yield from schema.get("properties", {})
    shapes = [shape for key in ("oneOf", "anyOf", "allOf") for shape in schema.get(key, [])]
    for one in [*shapes, *([schema["items"]] if "items" in schema else [])]:
        yield from _fields(one, document)
