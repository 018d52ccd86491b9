"""What the scripted engines answer: fixed tokens, in OpenAI's shapes as vLLM fills them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from stack.models import Endpoint

TOKENS = ("Paris", " is", " big.")
# The logarithms of the probabilities that are reported: the chosen token's, then those of other ones.
LOGPROBS = (-0.25, -1.5, -3.0)
PROMPT_TOKENS = 7  # whatever the prompt
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Answer:
    """An answer to a request at an endpoint: `tokens`, in as many equal `choices` as were asked for.

    `logprobs` is how many likely tokens are reported for each token; None reports nothing. `stop_reason` is the stop
    token or text that ended it, where it was one that is told. `forced` are the words behind the prompt's own tokens
    where the logprobs of a prompt are asked for, `echoed` the tokens of the one prompt that is to be repeated, of which
    the logprobs are told like those of the answer. With `has_token_ids` those of a chat's prompt are told: numbers that
    rise.
    """

    endpoint: Endpoint
    model: str
    tokens: tuple[str, ...]
    finish_reason: str
    choices: int = 1
    logprobs: int | None = None
    has_usage: bool = False
    stop_reason: int | str | None = None
    forced: tuple[str, ...] | None = None
    echoed: tuple[str, ...] = ()
    has_token_ids: bool = False

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        text = "".join(self.tokens)
        shape = {"message": {"role": "assistant", "content": text}} if self.endpoint == "chat" else {"text": text}
        choice = shape | self._end() | self._logprobs(self.tokens)
        shape = self._shape("", [choice | {"index": index} for index in range(self.choices)])
        return shape | {"usage": self._usage()} | self._prompt_logprobs() | self._prompt_token_ids()

    def events(self) -> Iterator[str]:
        """The answer as server-sent events: one item for each token, then the end with the usage, then [DONE]."""
        for number, token in enumerate(self.tokens):
            delta = {"content": token} if number else {"role": "assistant", "content": token}
            choice = {"delta": delta} if self.endpoint == "chat" else {"text": token}
            yield self._events(choice | {"finish_reason": None} | self._logprobs((token,)))
        last: dict[str, Any] = {"delta": {}} if self.endpoint == "chat" else {"text": ""}
        end = self._events(last | self._end())
        if self.has_usage:  # vLLM too sends several events at a time
            end += _event(self._shape(".chunk", []) | {"usage": self._usage()})
        yield end
        yield DONE

    def _events(self, choice: dict[str, Any]) -> str:
        shapes = (self._shape(".chunk", [choice | {"index": index}]) for index in range(self.choices))
        return "".join(_event(shape) for shape in shapes)

    def _shape(self, part: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.endpoint == "chat" else "text_completion"
        return {"id": "answer-1", "object": kind, "created": 1_700_000_000, "model": self.model, "choices": choices}

    def _end(self) -> dict[str, Any]:
        return {"finish_reason": self.finish_reason, "stop_reason": self.stop_reason}

    def _usage(self) -> dict[str, int]:
        completion = len(self.tokens) * self.choices
        total = PROMPT_TOKENS + completion
        return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": completion, "total_tokens": total}

    def _prompt_logprobs(self) -> dict[str, Any]:
        """The logprobs of the prompt's tokens, of which the first has none, if the request asks for them."""
        if self.forced is None:
            return {}
        words = (*(["prompt"] * (PROMPT_TOKENS - 1)), *self.forced)
        told = [{str(index): _told(word)} for index, word in enumerate(words)]
        return {"prompt_logprobs": [None, *told]}

    def _prompt_token_ids(self) -> dict[str, Any]:
        if not self.has_token_ids or self.endpoint != "chat":
            return {}
        return {"prompt_token_ids": list(range(PROMPT_TOKENS + len(self.forced or ())))}

    def _logprobs(self, tokens: tuple[str, ...]) -> dict[str, Any]:
        """The logprobs of tokens in vLLM's shape of each endpoint, if the request asks for them."""
        if self.logprobs is None:
            return {}
        if self.endpoint == "completions":
            tokens = (*self.echoed, *tokens)
            tops: list[dict[str, float] | None] = [_likeliest(token, max(1, self.logprobs)) for token in tokens]
            chosen: list[float | None] = [LOGPROBS[0]] * len(tokens)
            if self.echoed:
                tops[0], chosen[0] = None, None
            return {"logprobs": {"tokens": list(tokens), "token_logprobs": chosen, "top_logprobs": tops}}
        return {"logprobs": {"content": [_position(token, self.logprobs) for token in tokens]}}


def answer_to(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    tokens: tuple[str, ...] = TOKENS,
    finish_reason: str = "stop",
    stop_reason: int | str | None = None,
) -> Answer:
    """The answer of these tokens to an OpenAI request."""
    return Answer(
        endpoint=endpoint,
        model=str(body.get("model")),
        tokens=tokens,
        finish_reason=finish_reason,
        choices=_sequences(body) * (body.get("n") or 1),
        logprobs=_asked_logprobs(endpoint, body),
        has_usage=_wants_usage(body),
        stop_reason=stop_reason,
        forced=tuple(text_of(body).split()) if body.get("prompt_logprobs") is not None else None,
        echoed=tuple(map(str, _tokens_of(body))) if body.get("echo") else (),
        has_token_ids=bool(body.get("return_token_ids")),
    )


def as_many(count: int) -> tuple[str, ...]:
    """So many of the tokens, in turns."""
    return tuple(islice(cycle(TOKENS), count))


def text_of(body: Mapping[str, Any]) -> str:
    """The text of the last message, or of the prompt; that of a prompt of several texts or of tokens is the first."""
    if "messages" in body:
        content = body["messages"][-1].get("content") or ""
        return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)
    prompt = body.get("prompt") or ""
    return prompt if isinstance(prompt, str) else str(prompt[0])


def error_event(message: str) -> str:
    """What vLLM sends in the middle of a stream that fails; [DONE] follows."""
    return _event({"error": {"message": message, "type": "InternalServerError", "code": 500}})


def _sequences(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _tokens_of(body: Mapping[str, Any]) -> list[Any]:
    """The tokens of a prompt, or of the first one of several; the words of a text."""
    prompt = body.get("prompt") or ""
    first = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
    return first.split() if isinstance(first, str) else first


def _asked_logprobs(endpoint: Endpoint, body: Mapping[str, Any]) -> int | None:
    asked = body.get("logprobs")
    if asked is None or asked is False:  # 0 is a number of logprobs
        return None
    return int(asked) if endpoint == "completions" else body.get("top_logprobs") or 0


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    return bool(options.get("include_usage") if isinstance(options, dict) else options.include_usage)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def _told(word: str) -> dict[str, Any]:
    return {"logprob": LOGPROBS[0], "rank": 1, "decoded_token": word}


def _position(token: str, tops: int) -> dict[str, Any]:
    likely = [{"token": other, "logprob": value} for other, value in _likeliest(token, tops).items()]
    return {"token": token, "logprob": LOGPROBS[0], "top_logprobs": likely}


def _likeliest(token: str, count: int) -> dict[str, float]:
    return dict(list(zip((token, " other", " third"), LOGPROBS, strict=True))[:count])
