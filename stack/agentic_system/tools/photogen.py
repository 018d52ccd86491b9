"""Images made from descriptions, by an image model that the config names: `photogen` of `agents`.

It takes and answers what OpenAI's image API does:

    POST address/images/generations   {"prompt": …, "n": 1, "response_format": "b64_json"}
    200                               {"data": [{"b64_json": "…"}]}

The config names an address (as OpenAI's clients do by base_url: http://host/v1), or the application of Ray Serve whose
method `images` takes that body and gives that answer. The image becomes an attachment of the turn.
"""

import asyncio
import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stack.agentic_system.tools import asking, keys
from stack.agentic_system.tools.answers import read_json
from stack.agentic_system.tools.templates import Filled, fill
from stack.agentic_system.tools.tool import Call, Output, Stateless, ToolFailed
from stack.agents_config import RemoteKey
from stack.api.messages import Attachment
from stack.api.safety import RestAPIExecutionConfig, RestAPIMethod
from stack.attachments import MAX_IMAGE_BYTES, checked_image
from stack.errors import BadInput, TooLarge
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats import builtin_tool

NAME = "photogen"
OF = "the image model"
MAX_PROMPT_CHARACTERS = 4_000
# base64 has four characters for three bytes, and there may be some text around it.
MAX_ANSWER_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 64 * 1024


@dataclass(frozen=True)
class Photogen(Stateless):
    """Implements stack.agentic_system.tools.tool.Tool. `model` is an address or an application's id."""

    model: str
    name: str = NAME
    is_idempotent: bool = False  # an image may have to be paid for

    def definition(self) -> Definition:
        return builtin_tool(NAME)

    async def run(self, call: Call) -> Output:
        body = {"prompt": _prompt(call), "n": 1, "response_format": "b64_json"}
        if "://" in self.model:
            return await _output(await _asked(f"{self.model.rstrip('/')}/images/generations", body, call))
        return await _output(await _served(self.model, body))


@dataclass(frozen=True)
class RemotePhotogen(Stateless):
    """The same, asked at the address of a `remote_execution`, which answers as OpenAI's API does."""

    execution: RestAPIExecutionConfig
    operators: Mapping[str, RemoteKey] = field(default_factory=dict)
    name: str = NAME

    @property
    def is_idempotent(self) -> bool:
        return self.execution.method is RestAPIMethod.GET

    def definition(self) -> Definition:
        return builtin_tool(NAME)

    async def run(self, call: Call) -> Output:
        asked = fill(self.execution, {"query": _prompt(call)}, keys.remote(call, self.execution, self.operators))
        return await _output(read_json(await asking.ask(asking.FETCHER, asked, MAX_ANSWER_BYTES), OF))


def _prompt(call: Call) -> str:
    prompt = str(call.arguments["query"]).strip()
    if not 0 < len(prompt) <= MAX_PROMPT_CHARACTERS:
        raise ToolFailed(f"the query has {len(prompt)} characters; allowed: 1 to {MAX_PROMPT_CHARACTERS}")
    return prompt


async def _asked(url: str, body: dict[str, Any], call: Call) -> dict[str, Any]:
    key = keys.find(call, keys.PHOTOGEN)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = Filled(url, "POST", headers, json.dumps(body).encode())
    return read_json(await asking.ask(asking.INNER_FETCHER, request, MAX_ANSWER_BYTES), OF)


async def _served(application: str, body: dict[str, Any]) -> dict[str, Any]:
    """What an application of Ray Serve answers. Being cancelled, it cancels the request."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        handle = await asyncio.to_thread(serve.get_app_handle, application)
        request = handle.images.remote(body)
        try:
            answer = await request
        except asyncio.CancelledError:
            request.cancel()  # type: ignore[no-untyped-call]
            raise
    except (RayError, RayServeException) as error:
        raise ToolFailed(f"{OF} cannot answer now") from error
    if not isinstance(answer, dict):
        raise ToolFailed(f"{OF} does not answer as documented")
    return answer


async def _output(answer: dict[str, Any]) -> Output:
    data = answer.get("data")
    first = data[0] if isinstance(data, list) and data else None
    encoded = first.get("b64_json") if isinstance(first, dict) else None
    if not isinstance(encoded, str):
        raise ToolFailed(f"{OF} does not answer with an image in base64 (b64_json)")
    image = await asyncio.to_thread(image_attachment, encoded)
    return Output(f"The image is made. The user sees it, as an attachment of the type {image.mime_type}.", (image,))


def image_attachment(encoded: str) -> Attachment:
    """An image in base64 as an attachment. Raises ToolFailed for what is no image, or too large."""
    if len(encoded) > MAX_ANSWER_BYTES:
        raise ToolFailed(f"an image has more than {MAX_IMAGE_BYTES} bytes")
    try:
        content = base64.b64decode(encoded, validate=True)
        mime_type = checked_image(content)
    except (binascii.Error, ValueError) as error:
        raise ToolFailed("an image is not in base64") from error
    except (BadInput, TooLarge) as error:
        raise ToolFailed(error.message) from error
    if len(content) > MAX_IMAGE_BYTES:
        raise ToolFailed(f"an image has {len(content)} bytes; allowed: {MAX_IMAGE_BYTES}")
    return Attachment(content=f"data:{mime_type};base64,{base64.b64encode(content).decode()}", mime_type=mime_type)
