"""Wire types of the safety API."""

from enum import IntEnum, StrEnum
from typing import Annotated

from pydantic import Field

from stack.api.inference import MAX_MESSAGES, ToolParamDefinition
from stack.api.messages import Message
from stack.api.wire import Info, Request, Wire, at_most

MAX_SHIELDS = 20


class BuiltinShield(StrEnum):
    llama_guard = "llama_guard"
    code_scanner_guard = "code_scanner_guard"
    third_party_shield = "third_party_shield"
    injection_shield = "injection_shield"
    jailbreak_shield = "jailbreak_shield"


ShieldId = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
# A built-in one, or the id of one of the config.
ShieldType = BuiltinShield | ShieldId


class OnViolationAction(IntEnum):
    """What becomes of a violation: it is told, it is told and logged as a warning, or the request fails by it."""

    ignore = 0
    warn = 1
    raise_ = 2


class RestAPIMethod(StrEnum):
    GET = "GET"
    POST = "POST"
    PUT = "PUT"
    DELETE = "DELETE"


class RestAPIExecutionConfig(Wire):
    """How a third party is asked. `body` goes into the JSON beside the messages, `params` into the address."""

    url: Annotated[str, Field(min_length=1, max_length=4_000, pattern="^(https?://|file://|data:)")]
    method: RestAPIMethod
    params: Info | None = None
    headers: Info | None = None
    body: Info | None = None


class ShieldDefinition(Wire):
    """A shield to run. `parameters` and `execution_config` are of the third party that a `third_party_shield` asks."""

    shield_type: ShieldType
    on_violation_action: OnViolationAction
    description: Annotated[str, Field(max_length=10_000)] | None = None
    parameters: Annotated[dict[Annotated[str, Field(max_length=200)], ToolParamDefinition], at_most(100)] | None = None
    execution_config: RestAPIExecutionConfig | None = None


class RunShieldsRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1), at_most(MAX_MESSAGES)]
    shields: Annotated[list[ShieldDefinition], Field(min_length=1), at_most(MAX_SHIELDS)]


class ShieldResponse(Wire):
    """What a shield says of the messages; `score`, from 0 to 1, is how likely it takes a violation to be."""

    shield_type: ShieldType
    is_violation: bool
    violation_type: str | None = None
    violation_return_message: str | None = None
    score: float | None = None


class RunShieldsResponse(Wire):
    """The shields' responses, in their order."""

    responses: list[ShieldResponse]


class ShieldInfo(Wire):
    """A shield that can be named as a `shield_type`; `model` is the one that it asks."""

    shield_type: ShieldType
    kind: str
    version: str
    description: str
    model: str | None = None
    threshold: float | None = None


class ShieldList(Wire):
    data: list[ShieldInfo]
