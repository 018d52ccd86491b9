"""A scripted engine whose answers follow from the question and the seed, as sampled ones do."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from serve_apps.scripted_answers import answer_to, text_of
from stack.errors import Unavailable
from stack.models import Endpoint
from tests.scripted_engine import ScriptedEngine


def some_words(body: dict[str, Any]) -> str:
    """One to seven words, by the seed."""
    return " ".join(["word"] * (body.get("seed", 0) % 7 + 1))


class VariedEngine(ScriptedEngine):
    """Answers with what `say` makes of the body; raises what `refusals` has for a text in the last message.

    It is away for all that it is asked after `away_after` answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.say: Callable[[dict[str, Any]], str] = some_words
        self.refusals: dict[str, Exception] = {}
        self.away_after: int | None = None
        self.answers = 0

    async def _generate(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        for text, error in self.refusals.items():
            if text in text_of(body):
                raise error
        if isinstance(self.fault, BaseException):
            raise self.fault
        if self.away_after is not None and self.answers >= self.away_after:
            raise Unavailable("the model is being started")
        self.answers += 1
        yield json.dumps(answer_to(endpoint, body, (self.say(body),), self.finish_reason).whole()).encode()
