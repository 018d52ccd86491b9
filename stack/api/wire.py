"""The base of all wire types, and how a failed validation is put into words."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

# A name that a client chooses and that becomes part of file names and Ray job ids.
Id = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
ModelId = Annotated[str, Field(min_length=1, max_length=300)]


class Wire(BaseModel):
    """A wire type: no unknown keys, and an error that names the known ones."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in cls.model_fields]
            if unknown:
                raise ValueError(f"unknown key {unknown[0]!r}; allowed: {', '.join(cls.model_fields)}")
        return value


class Request(Wire):
    """The body of a request, flat or wrapped: the specification wraps many in `request`, its client sends them flat."""

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and set(value) == {"request"} and isinstance(value["request"], Mapping):
            return value["request"]
        return value


def explain(error: ErrorDetails) -> tuple[str, str]:
    """The place and the description of one validation error, for people: the wrong value and what is allowed."""
    place = ".".join(str(part) for part in error["loc"])
    description = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return place, "is required"
    if error["type"] not in ("value_error", "json_invalid", "union_tag_invalid"):
        shown = repr(error["input"])
        description += f", not {shown if len(shown) <= 80 else shown[:77] + '...'}"
    return place, description


def describe(error: ValidationError) -> str:
    """All of a validation error in one line."""
    return "; ".join(": ".join(part for part in explain(one) if part) for one in error.errors())
