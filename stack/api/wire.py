"""The base of all wire types, and how a failed validation is put into words."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

# A name that a client chooses and that becomes part of file names and Ray job ids: no two dots, none at the end.
Id = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9]([A-Za-z0-9_-]|\.[A-Za-z0-9_-])*$")]
MAX_INFO_BYTES = 16 * 2**10
MAX_INFO_DEPTH = 20


def without_nul(value: str) -> str:
    """Refuses the character that PostgreSQL does not take."""
    if "\0" in value:
        raise ValueError("holds a NUL character, which cannot be kept")
    return value


ModelId = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(without_nul)]


def at_most(entries: int) -> BeforeValidator:
    """Refuses a mapping or list with more entries before any of them is looked at, so that a refusal is cheap."""

    def check(value: Any) -> Any:
        if isinstance(value, Mapping | list) and len(value) > entries:
            raise ValueError(f"has {len(value)} entries; allowed: at most {entries}")
        return value

    return BeforeValidator(check)


def _info(value: dict[str, Any]) -> dict[str, Any]:
    """Refuses what cannot be kept or answered again: NaN, half characters, deep nesting, great size."""
    _require_depth(value, MAX_INFO_DEPTH)
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except ValueError as error:
        raise ValueError("holds NaN, an infinite number, or half of a character") from error
    if size > MAX_INFO_BYTES:
        raise ValueError(f"has {size} bytes as JSON; allowed: at most {MAX_INFO_BYTES}")
    return value


def _require_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if left == 0:
            raise ValueError(f"is nested deeper than {MAX_INFO_DEPTH} levels")
        for one in value.values() if isinstance(value, dict) else value:
            _require_depth(one, left - 1)


# What people note about a thing, as an object of JSON.
Info = Annotated[dict[str, Any], at_most(1_000), AfterValidator(_info)]

# What pydantic puts into the place of an error beside keys and indices: types, as in list[constrained-str], and tags.
_PYDANTICS_OWN = re.compile(r"[\[(]|^constrained-|^(str|described|registered)$")
_ROLES = frozenset(("user", "system", "ipython", "assistant"))


class Wire(BaseModel):
    """A wire type: no unknown keys, and an error that names the known ones."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), json_schema_extra={"additionalProperties": False})
    _keys: ClassVar[dict[str, None]]  # as they are sent; a dict keeps their order

    @classmethod
    def __pydantic_init_subclass__(cls, **_options: Any) -> None:
        cls._keys = {field.alias or name: None for name, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not value.keys() <= cls._keys.keys():
            unknown = next(key for key in value if key not in cls._keys)
            raise ValueError(f"unknown key {_shown(unknown)}; allowed: {', '.join(cls._keys)}")
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
    place = ".".join(_written(error["loc"]))
    description = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return place, "is required"
    if error["type"] == "union_tag_invalid":
        union = error["ctx"]
        return place, f"{union['discriminator']} is {_shown(union['tag'])}; allowed: {union['expected_tags']}"
    if error["type"] not in ("value_error", "json_invalid"):
        description += f", not {_shown(error['input'])}"
    return place, description


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _written(place: tuple[int | str, ...]) -> list[str]:
    """The keys and indices of a place, without the names that pydantic gives to the members of a union."""
    before: tuple[int | str | None, ...] = (None, *place)
    return [
        str(part)[:100]
        for part, previous in zip(place, before, strict=False)
        if not _PYDANTICS_OWN.search(str(part)) and not (part in _ROLES and isinstance(previous, int))
    ]


def describe(error: ValidationError) -> str:
    """All of a validation error in one line."""
    return "; ".join(": ".join(part for part in explain(one) if part) for one in error.errors())
