"""From the id of a model to what serves it, and the one way to ask it something.

A model is one of the config, one that was added (stack/added_models.py), or a fine-tuned adapter of one of these, whose
id is `base:job_uuid`. What serves a model is an Engine: Ray Serve's application of the model's name, or in tests a
scripted one. Engines speak OpenAI's shapes, because vLLM does; the answer passes through as bytes, so that the OpenAI
door does not parse it. Embedding models are models of the config too, which answer nothing but vectors, and so are
reward models, which give scores; a job may have trained such a one, which is its tenant's.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stack import tracing
from stack.config import Config, EmbeddingModel, Judge, LanguageModel, RewardModel, SequenceClassifier
from stack.errors import BadInput, EngineFailed, NotFound, StackError, TooManyRequests, Unavailable
from stack.store import AddedModel, Store

Endpoint = Literal["chat", "completions"]


@dataclass(frozen=True)
class Model:
    """A model that can be asked. `base` is its entry in the config; an adapter is loaded on top of it."""

    id: str
    base: LanguageModel
    is_adapter: bool
    created_at: str | None = None


# What has a score for an answer: a classifier, or a language model that is asked for it.
Rewarding = RewardModel | Judge


@dataclass(frozen=True)
class Failure:
    """What an engine yields instead of an answer: a status as in HTTP and a message."""

    status: int
    message: str
    param: str | None = None

    def error(self) -> StackError:
        if self.status == 404:
            return NotFound(self.message, param=self.param)
        if self.status == 429:
            return TooManyRequests(self.message, retry_after=1)
        if self.status == 503:
            return Unavailable(self.message)
        if 400 <= self.status < 500:
            return BadInput(self.message, param=self.param)
        return EngineFailed(self.message)


@dataclass(frozen=True)
class Ended:
    """The end of a streamed answer: how many bytes were sent, and what broke it off, if anything did."""

    sent: int
    failure: Failure | None = None


@dataclass(frozen=True)
class Embeddings:
    """The vectors of texts, one row for each, and how many tokens all the texts have."""

    vectors: NDArray[np.float32]
    tokens: int


# A text, or the tokens of one in the model's own vocabulary.
Embeddable = str | list[int]

# A text, or messages as chat templates take them, which the model's own template makes a text of.
Classifiable = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Scores:
    """What a sequence classifier gives to inputs: its logits for each label, and how many tokens it has read.

    There is one row of `values` for each window of an input, which is of the input `inputs[row]`; the rows are in the
    order of the inputs, and an input that is not split has one. A model of one label has no probabilities: its number
    is a score as it is. Of one that `is_multi_label`, each label has a probability of its own, and several can be true.
    """

    values: NDArray[np.float32]  # (windows, labels)
    inputs: NDArray[np.int64]  # (windows,)
    labels: tuple[str, ...]
    tokens: int
    is_multi_label: bool = False


class Engine(Protocol):
    """What answers for models.

    `generate` yields the answer of an OpenAI request as bytes: one JSON object, or, when the body asks for a stream,
    whole server-sent events, one or several at a time. Closing the iterator aborts the generation. It raises
    StackError, before the first item where it can.

    `embed` gives the vectors of texts. A text over the model's length is cut with `truncate`; without it BadInput is
    raised, which names its index and both lengths.

    `classify` gives the logits of texts and of messages. With `windows` an input that is longer than the model takes is
    scored in windows of the model's length, each of which begins half a window after the one before, up to the one that
    ends with the input. Without it BadInput is raised, whose `param` is the index of the input, as for messages that
    the model's chat template does not take.
    """

    def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]: ...

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings: ...

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores: ...


class Models:
    """The models that a tenant can ask: those of the config and the added ones, which are everybody's, and its own: the
    private ones among the added, and adapters.

    Where models of one kind are meant (language, embedding, reward), one of another kind is BadInput.
    """

    def __init__(self, config: Config, store: Store, engine: Engine, tenant: str) -> None:
        self._configured = {model.id: Model(model.id, model, is_adapter=False) for model in config.models}
        self._embedding_models = {model.id: model for model in config.embedding_models}
        self._reward_models = {model.id: model for model in config.reward_models}
        self._taken = {model.id for model in (*config.all_models, *config.judges)}
        self._store = store
        self._engine = engine
        self._tenant = tenant

    def all(self) -> list[Model | EmbeddingModel | Rewarding]:
        """The language models, their adapters, newest first, then the embedding models and the reward models."""
        return [*self.language_models(), *self._embedding_models.values(), *self.reward_models()]

    def language_models(self) -> list[Model]:
        """Those of the config, those that were added, then the adapters, newest first."""
        rows = self._store.adapters.list(self._tenant)
        adapters = (self._of_adapter(row.model_id, row.base, row.created_at) for row in rows)
        added = (model for model in self._all_added() if isinstance(model, Model))
        return [*self._configured.values(), *added, *(model for model in adapters if model)]

    def reward_models(self) -> list[Rewarding]:
        """Those of the config, then those that jobs have trained."""
        return [*self._reward_models.values(), *(one for one in self._all_added() if isinstance(one, RewardModel))]

    def get(self, id: str) -> Model:
        """The language model of this id. Raises NotFound or BadInput, naming the ones that there are."""
        model = self.get_any(id)
        if not isinstance(model, Model):
            able = _listed(one.id for one in self.language_models())
            raise BadInput(f"{_kind(model)} and no text; models for that: {able}", param="model")
        return model

    def get_any(self, id: str) -> Model | EmbeddingModel | Rewarding:
        """The model of this id, of whatever kind. Raises NotFound, naming the known ones."""
        configured = self._configured.get(id) or self._embedding_models.get(id) or self._reward_models.get(id)
        if model := configured or self._added(id):
            return model
        row = self._store.adapters.get(self._tenant, id)
        model = self._of_adapter(row.model_id, row.base, row.created_at) if row else None
        if model is None:
            message = f"there is no model {id!r}; there are: {_listed(one.id for one in self.all())}"
            raise NotFound(message, param="model", code="model_not_found")
        return model

    def get_reward_model(self, id: str) -> Rewarding:
        """The reward model of this id. Raises as `get` does."""
        try:
            model = self.get_any(id)
        except NotFound as error:
            message = f"there is no reward model {id!r}; there are: {self._listed_reward_models()}"
            raise NotFound(message, param=error.param, code=error.code) from error
        if isinstance(model, Model | EmbeddingModel):
            able = self._listed_reward_models()
            raise BadInput(f"{_kind(model)} and no scores; models for that: {able}", param="model")
        return model

    async def find_reward_model(self, id: str) -> Rewarding:
        """`get_reward_model`, without blocking the event loop."""
        if (model := self._reward_models.get(id)) is not None:
            return model
        return await asyncio.to_thread(self.get_reward_model, id)

    async def find_embedding_model(self, id: str) -> EmbeddingModel:
        """`get_embedding_model`, without blocking the event loop."""
        if id in self._embedding_models:
            return self._embedding_models[id]
        return await asyncio.to_thread(self.get_embedding_model, id)

    def get_embedding_model(self, id: str) -> EmbeddingModel:
        """The embedding model of this id. Raises as `get` does."""
        model = self.get_any(id)
        if isinstance(model, EmbeddingModel):
            return model
        able = _listed(self._embedding_models) or "none, as the config lists no embedding_models"
        raise BadInput(f"{_kind(model)} and no embeddings; models for that: {able}", param="model")

    async def find(self, id: str) -> Model:
        """`get`, without blocking the event loop for those that the database knows."""
        if id in self._configured:
            return self._configured[id]
        known = (self._store.models.known() or {}).get(id)
        if known and isinstance(model := self._of_added(known), Model):
            return model
        return await asyncio.to_thread(self.get, id)

    async def embed(self, id: str, texts: Sequence[Embeddable], truncate: bool = False) -> Embeddings:
        """The vectors of texts by an embedding model. Raises as Engine.embed does."""
        model = await self.find_embedding_model(id)
        if not tracing.is_on():
            return await self._engine.embed(model, texts, truncate)
        with tracing.leaf("model", model=model.id, endpoint="embeddings"):
            return await self._engine.embed(model, texts, truncate)

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], *, windows: bool) -> Scores:
        """The logits of inputs by a sequence classifier. Raises as Engine.classify does."""
        if not tracing.is_on():
            return await self._engine.classify(model, inputs, windows)
        with tracing.leaf("model", model=model.id, endpoint="classify"):
            return await self._engine.classify(model, inputs, windows)

    async def answer(self, endpoint: Endpoint, body: dict[str, Any]) -> bytes:
        """The JSON answer to an OpenAI request, whose `model` names the model and whose `stream` is false."""
        model = await self.find(body["model"])
        async with aclosing(self._generate(model, endpoint, body)) as items:
            answer = b"".join([item async for item in items])
        if not answer:
            raise EngineFailed(f"the model {model.id!r} gave no answer")
        return answer

    async def stream(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        """The server-sent events of an OpenAI request, as bytes.

        The engine's first item is awaited before this returns, so that a request that cannot be answered raises here
        and not in the middle of a stream. The iterator raises EngineFailed where the engine reports an error or its
        stream ends without `[DONE]`.
        """
        model = await self.find(body["model"])
        items = self._generate(model, endpoint, body)
        try:
            first = await anext(items)
        except StopAsyncIteration:
            raise EngineFailed(f"the model {model.id!r} gave no answer") from None
        return _whole(first, items)

    def _generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        items = self._engine.generate(model, endpoint, body)
        return _traced(model, endpoint, items) if tracing.is_on() else items

    def _added(self, id: str) -> Model | RewardModel | None:
        row = self._store.models.recent().get(id)
        return self._of_added(row) if row is not None else None

    def _all_added(self) -> list[Model | RewardModel]:
        rows = self._store.models.recent().values()
        return [model for row in rows if (model := self._of_added(row))]

    def _of_added(self, row: AddedModel) -> Model | RewardModel | None:
        """None for another tenant's private one, one that has come into the config, and one that this version of the
        stack does not take."""
        if not row.is_seen_by(self._tenant) or row.id in self._taken:
            return None
        try:
            model = model_of(row.entry)
        except ValidationError:  # the job supervisor says so in the row
            return None
        if isinstance(model, RewardModel):
            return model
        return Model(row.id, model, is_adapter=False, created_at=row.created_at)

    def _of_adapter(self, id: str, base: str, created_at: str) -> Model | None:
        """An adapter whose base model is not served any more is not served either."""
        model = self._configured.get(base) or self._added(base)
        return Model(id, model.base, is_adapter=True, created_at=created_at) if isinstance(model, Model) else None

    def _listed_reward_models(self) -> str:
        return _listed(model.id for model in self.reward_models()) or "none, as the config lists no reward_models"


def model_of(entry: dict[str, Any]) -> LanguageModel | RewardModel:
    """An added model by its entry, in which only a reward model has a `kind`. Raises ValidationError."""
    return (RewardModel if "kind" in entry else LanguageModel).model_validate(entry)


def _kind(model: Model | EmbeddingModel | Rewarding) -> str:
    """The beginning of a sentence on what a model does."""
    match model:
        case Model():
            return f"the model {model.id!r} makes text"
        case EmbeddingModel():
            return f"the model {model.id!r} makes embeddings"
        case _:
            return f"the model {model.id!r} gives scores"


def _listed(ids: Iterable[str]) -> str:
    """Ids for a message: ten of them, and how many more there are."""
    known = list(ids)
    return ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")


async def _traced(model: Model, endpoint: Endpoint, items: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """A model's answer, in a span from its question to its end."""
    with tracing.leaf("model", model=model.id, endpoint=endpoint):
        async with aclosing(items):
            async for item in items:
                yield item


_ERROR = b'data: {"error"'
_DONE = b"data: [DONE]\n\n"


async def _whole(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """A stream that ends as it should, or raises. Quotes within texts are escaped, so only events begin like these."""
    async with aclosing(rest):
        item = first
        while True:
            if _ERROR in item:
                if before := item[: item.index(_ERROR)]:
                    yield before
                raise EngineFailed(json.loads(item[item.index(_ERROR) + 6 :].split(b"\n\n")[0])["error"]["message"])
            yield item
            if item.endswith(_DONE):
                # What is left is the request's own end: broken off here, it would cost a cancelling.
                with suppress(StackError):
                    async for _ in rest:
                        pass
                return
            try:
                item = await anext(rest)
            except StopAsyncIteration:
                raise EngineFailed("the model's answer broke off") from None
