"""A shield elsewhere, which is sent the messages and answers as a ShieldResponse does.

    POST url?params  {**body, "messages": [{"role": "user", "content": "…"}]}
    200              {"is_violation": true, "violation_type": "…", "violation_return_message": "…", "score": 0.9}

`is_violation` is required, the others are not. The address must be a public one, by https; redirects are not followed.
"""

import asyncio
import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

from pydantic import Field, ValidationError

from stack.api.safety import RestAPIExecutionConfig
from stack.api.wire import Wire, describe
from stack.context import Context
from stack.errors import BadInput, Unavailable
from stack.fetcher import Fetcher, refused_header
from stack.shield_config import ThirdPartyShield, why_not_askable
from stack.shields.verdict import UNJUDGED, Said, Verdict

logger = logging.getLogger("ray.serve")

VERSION = "1"
MAX_ANSWER_BYTES = 64 * 1024
FETCHER = Fetcher()
# They wait for others: threads of their own, which are not those of the routes. What requests name may hang as long as
# its sender likes, and takes none of the threads that the config's third parties have.
_CALLS_OF_REQUESTS = ThreadPoolExecutor(32, thread_name_prefix="third-party-of-request")
_CALLS_OF_CONFIG = ThreadPoolExecutor(32, thread_name_prefix="third-party-of-config")


class Answer(Wire):
    """What a third party answers."""

    is_violation: Annotated[bool, Field(strict=True)]
    violation_type: Annotated[str, Field(max_length=1_000)] | None = None
    violation_return_message: Annotated[str, Field(max_length=10_000)] | None = None
    score: Annotated[float, Field(ge=0, le=1)] | None = None


async def judge(
    _: Context, shield: ThirdPartyShield, said: Sequence[Said], execution: RestAPIExecutionConfig | None
) -> Verdict:
    """Asks the third party. What it does not answer as it should is a violation, unless the shield fails open.

    Raises BadInput for an `execution_config` that is missing, or is the request's and not allowed.
    """
    asked = execution or shield.execution_config
    if asked is None:
        raise BadInput(
            f"the shield {shield.id!r} needs an execution_config, which says where it is", param="execution_config"
        )
    try:
        url, headers, content = _request(asked, said)
        fetcher = replace(FETCHER, seconds=shield.timeout_s, idle_seconds=shield.timeout_s)
        call = partial(_send, fetcher, url, asked.method.value, headers, content)
        threads = _CALLS_OF_CONFIG if execution is None else _CALLS_OF_REQUESTS
        async with asyncio.timeout(shield.timeout_s + 1):  # it may have waited for a thread, too
            answer = await asyncio.get_running_loop().run_in_executor(threads, call)
        return read(answer)
    except (Unavailable, TimeoutError) as error:
        reason = str(error) or f"it has not answered within {shield.timeout_s:g} s"
    except BadInput as error:
        if execution is not None:
            raise
        # It is the config's: whoever asks did not name its address, and its params are not for the log either.
        logger.warning("shield=%s cannot be asked: %s", shield.id, re.sub(r"\?.*", "?…", error.message))
        reason = "its execution_config cannot be used, or there is no such host now"
    return Verdict(not shield.fails_open, UNJUDGED, f"The third party could not be asked: {reason}")


def read(answer: bytes) -> Verdict:
    """The verdict of an answer. Raises Unavailable for one of another shape."""
    try:
        told = Answer.model_validate_json(answer)
    except ValidationError as error:
        raise Unavailable(f"it does not answer as documented: {describe(error)[:300]}") from error
    return Verdict(told.is_violation, told.violation_type, told.violation_return_message, told.score)


def _send(fetcher: Fetcher, url: str, method: str, headers: Mapping[str, str], content: bytes) -> bytes:
    try:
        return fetcher.send(url, method, headers, content, MAX_ANSWER_BYTES)
    except BadInput as error:
        raise BadInput(error.message, param="execution_config.url") from error


def _request(asked: RestAPIExecutionConfig, said: Sequence[Said]) -> tuple[str, dict[str, str], bytes]:
    """The address with its parameters, the headers and the content."""
    if (problem := why_not_askable(asked)) is not None:
        field, reason = problem
        raise BadInput(reason, param=f"execution_config.{field}")
    params = _texts(asked.params or {}, "params")
    separator = "&" if "?" in asked.url else "?"
    url = asked.url + (separator + urlencode(params) if params else "")
    headers = _texts(asked.headers or {}, "headers")
    if (name := refused_header(headers)) is not None:
        raise BadInput(f"the header {name[:100]!r} cannot be sent", param="execution_config.headers")
    messages = [{"role": one.role, "content": one.text} for one in said]
    content = json.dumps({**(asked.body or {}), "messages": messages}).encode()
    return url, headers, content


def _texts(values: Mapping[str, Any], field: str) -> dict[str, str]:
    """Simple values as text; none is left out."""
    texts = {}
    for name, value in values.items():
        if isinstance(value, dict | list):
            raise BadInput(
                f"{field}: {name[:100]!r} is a {type(value).__name__}; allowed: a text, a number or a truth value",
                param=f"execution_config.{field}",
            )
        if value is not None:
            texts[name] = json.dumps(value) if isinstance(value, bool) else str(value)
    return texts
