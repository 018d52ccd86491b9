"""An engine for tests and benches that answers with fixed tokens, at a fixed rate, and fails on command.

It takes vLLM's place behind ray.serve.llm: a Serve config file whose model has the `import_path`
`serve_apps.scripted_engine:build` in place of `serve_apps.llm:build` serves it with everything else as it is. The
model's files are not read. `tokens_per_second: 200` among the application's args sets the rate of each stream (50).

An answer has as many tokens as the request allows: one round of the script where it sets no limit. Where the text of
the last message, or the prompt, ends with `say:TEXT`, it is that text, as one token.

A fault is asked for by a word in the text of the last message, or in the prompt:

    fault:die-before-first   the replica's process exits before it answers
    fault:die-after-3        … after so many tokens
    fault:hang-after-3       nothing comes any more after so many tokens; fault:hang, nothing at all
    fault:error-after-3      the engine reports an error after so many tokens; fault:error, at once
    fault:slow               one token a second
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from ray.serve import Application
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionResponse, CompletionResponse, EmbeddingResponse, ErrorResponse

from serve_apps.llm import LLM, application_of
from serve_apps.scripted_answers import DONE, answer_to, as_many, error_event, text_of
from stack.errors import BadInput
from stack.models import Endpoint

TOKENS_PER_SECOND = 50.0
SLOW_TOKENS_PER_SECOND = 1.0
EMBEDDING = [0.5, -0.5, 0.5, -0.5]
_SAY = re.compile(r"(?<!\S)say:(.+)\Z", re.DOTALL)
_FAULT = re.compile(r"fault:(die|hang|error|slow)(?:-before-first|-after-(\d{1,6}))?(?![\w-])")


def build(args: dict[str, Any]) -> Application:
    """The application of one model, as serve_apps.llm:build makes it, on a scripted engine."""
    rate = args.get("tokens_per_second", TOKENS_PER_SECOND)
    if not isinstance(rate, int | float) or not 0 < rate <= 1_000_000:
        raise BadInput(f"tokens_per_second is {rate!r}; allowed: a number above 0, up to 1000000")
    others = {key: value for key, value in args.items() if key != "tokens_per_second"}
    return application_of(others, ScriptedLLM, engine_cls=partial(ScriptedEngine, tokens_per_second=rate))


@dataclass
class Counts:
    """Requests: all so far, those under way, and those that were closed or cancelled before their end."""

    started: int = 0
    running: int = 0
    aborted: int = 0


@dataclass(frozen=True)
class Fault:
    """What goes wrong, after so many tokens."""

    kind: Literal["die", "hang", "error", "slow"]
    after: int = 0

    @classmethod
    def asked_for(cls, text: str) -> "Fault | None":
        """The fault that a text asks for, by its first word of the kind."""
        found = _FAULT.search(text)
        return cls(found[1], int(found[2] or 0)) if found else None  # type: ignore[arg-type]

    async def happen(self, is_stream: bool) -> list[Any]:
        """Does not return unless it is an error, which is what the engine yields then."""
        if self.kind == "die":
            os._exit(1)  # as a process that is killed: nothing is said
        if self.kind == "hang":
            await asyncio.Event().wait()
        message = "the scripted engine was told to fail"
        if is_stream:
            return [error_event(message), DONE]
        return [ErrorResponse(error=dict(message=message, type="InternalServerError", code=500))]


class ScriptedLLM(LLM):
    """Serves a scripted engine, and tells how it does."""

    async def counts(self) -> dict[str, int]:
        return asdict(self.engine.counts)


class ScriptedEngine:
    """Implements the engine of ray.serve.llm, which is given as `engine_cls` or named by RAYLLM_VLLM_ENGINE_CLS."""

    def __init__(self, _: LLMConfig | None = None, tokens_per_second: float = TOKENS_PER_SECOND) -> None:
        self.counts = Counts()
        self._rate = tokens_per_second

    async def start(self) -> None:
        """It is ready as it is."""

    async def check_health(self) -> None:
        """It is well as long as its process is."""

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def resolve_lora(self, lora_model: Any) -> None:
        """Every adapter answers as the base model does."""

    async def reset_prefix_cache(self) -> None:
        """It has none."""

    async def shutdown(self) -> None:
        """It holds nothing."""

    def chat(self, request: Any, _: Any = None) -> AsyncGenerator[Any]:
        """Server-sent events of a chat, or one response."""
        return self._counted("chat", dict(request))

    def completions(self, request: Any, _: Any = None) -> AsyncGenerator[Any]:
        """Server-sent events of a completion, or one response."""
        return self._counted("completions", dict(request))

    async def embeddings(self, request: Any, _: Any = None) -> AsyncGenerator[Any]:
        """The same vector for every text."""
        given = request.input
        texts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        data = [{"index": index, "embedding": EMBEDDING} for index in range(len(texts))]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        yield EmbeddingResponse(model=request.model, data=data, usage=usage)

    async def _counted(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[Any]:
        self.counts.started += 1
        self.counts.running += 1
        is_last = False
        try:
            async with aclosing(self._answer(endpoint, body)) as items:
                async for item in items:
                    is_last = item == DONE or not isinstance(item, str)
                    yield item
        except (GeneratorExit, asyncio.CancelledError):
            if not is_last:
                self.counts.aborted += 1
            raise
        finally:
            self.counts.running -= 1

    async def _answer(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[Any]:
        """Token by token, each at its time after the start, so that what comes late does not delay the rest."""
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if told := _SAY.search(text_of(body)):
            answer = answer_to(endpoint, body, (told[1],))
        else:
            answer = answer_to(endpoint, body, as_many(limit), "length") if limit else answer_to(endpoint, body)
        fault = Fault.asked_for(text_of(body))
        interval = 1 / (SLOW_TOKENS_PER_SECOND if fault and fault.kind == "slow" else self._rate)
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number, event in enumerate(answer.events()):
            if fault and number == fault.after and fault.kind != "slow":
                for item in await fault.happen(is_stream=bool(body.get("stream"))):
                    yield item
                return
            if number < len(answer.tokens):
                wait = start + (number + 1) * interval - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
            if body.get("stream"):
                yield event
        if not body.get("stream"):
            response = ChatCompletionResponse if endpoint == "chat" else CompletionResponse
            yield response.model_validate(answer.whole())
