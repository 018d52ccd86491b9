"""A scripted engine whose answers follow from the question and the seed, as sampled ones do."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from serve_apps.scripted_answers import answer_to, text_of
from stack.models import Endpoint
from tests.scripted_engine import ScriptedEngine


def some_words(body: dict[str, Any]) -> str:
    """One to seven words, by the seed."""
    return " ".join(["word"] * (body.get("seed", 0) % 7 + 1))


class VariedEngine(ScriptedEngine):
    """Answers with what `say` makes of the body; raises what `refusals` has for a text in the last message."""

    def __init__(self) -> None:
        super().__init__()
        self.say: Callable[[dict[str, Any]], str] = some_words
        self.refusals: dict[str, Exception] = {}

    async def _generate(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        for text, error in self.refusals.items():
            if text in text_of(body):
                raise error
        if isinstance(self.fault, BaseException):
            raise self.fault
        yield json.dumps(answer_to(endpoint, body, (self.say(body),), self.finish_reason).whole()).encode()
