"""An embedding model as a Serve deployment: sentence-transformers, with the texts of several requests in one batch."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from ray import serve

from stack.api.wire import Wire, describe
from stack.config import EmbeddingModel
from stack.errors import BadInput
from stack.models import Embeddable, Embeddings, Failure

# A text as the model takes it: the ids of its tokens, with the special ones.
Tokens = list[int]
Vectors = NDArray[np.float32]
T = TypeVar("T")

# The texts of one pass have at most so many tokens, so that what waits for it, such as the health check, waits briefly.
MAX_PASS_TOKENS = 16_384
# Texts of this length or less are padded to one length.
SHORT_TOKENS = 16


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one embedding model: its entry in the config."""
    try:
        model = EmbeddingApplication.model_validate(args).model
    except ValidationError as error:
        raise BadInput(f"args of an embedding model's application: {describe(error)}") from error
    if model.min_replicas == model.most_replicas:
        replicas: dict[str, Any] = dict(num_replicas=model.min_replicas)
    else:
        replicas = dict(
            autoscaling_config=dict(
                min_replicas=model.min_replicas,
                max_replicas=model.most_replicas,
                target_ongoing_requests=model.target_ongoing_requests,
                upscale_delay_s=model.upscale_delay_s,
                downscale_delay_s=model.downscale_delay_s,
            )
        )
    deployment = Embedder.options(  # type: ignore[attr-defined]
        **replicas,
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        ray_actor_options=dict(
            num_cpus=model.cpus, num_gpus=model.gpus, runtime_env=dict(env_vars={"HF_HUB_OFFLINE": "1"})
        ),
    )
    return deployment.bind(model)  # type: ignore[no-any-return]


class EmbeddingApplication(Wire):
    """The args of an embedding model's application."""

    model: EmbeddingModel


@serve.deployment
class Embedder:
    """Embeds texts. One thread computes and another one tokenizes, so that the event loop does neither."""

    def __init__(self, model: EmbeddingModel) -> None:
        self._encoder = Encoder(model)
        self._probe = self._encoder.tokenize(["Are you well?"], truncate=True)
        self._max_batch = model.max_batch
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._idle = asyncio.Event()
        self._idle.set()
        self._encode_with_others = serve.batch(
            max_batch_size=model.max_batch, batch_wait_timeout_s=model.batch_wait_s, batch_size_fn=_texts_in
        )(self._encode_batch)

    async def embed(self, texts: Sequence[Embeddable], truncate: bool) -> Embeddings | Failure:
        """The vectors of texts, in their order, or why they are refused (see stack.models.Engine)."""
        try:
            tokens = await _in_thread(self._tokenizing, self._encoder.tokenize, texts, truncate)
        except BadInput as error:
            return Failure(error.status, error.message, error.param)
        by_length = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        vectors = np.empty((len(tokens), self._encoder.dimensions), dtype=np.float32)
        # One chunk after the other: requests take turns, and of one that is cancelled no more is computed.
        for start in range(0, len(tokens), self._max_batch):
            chunk = by_length[start : start + self._max_batch]
            vectors[chunk] = await self._encode([tokens[index] for index in chunk])
        if not np.isfinite(vectors).all():
            return Failure(500, "the model answered with numbers that are none (NaN or infinite)")
        return Embeddings(vectors, sum(len(one) for one in tokens))

    async def check_health(self) -> None:
        """Raises unless the model answers."""
        vectors = await _in_thread(self._computing, self._encoder.encode, self._probe)
        if not np.isfinite(vectors).all():
            raise RuntimeError("the embedding model answers with numbers that are none (NaN or infinite)")

    async def _encode(self, chunk: list[Tokens]) -> Vectors:
        # Serve hands over a batch as soon as its time is up, be the model free or not: while it computes, what comes
        # is held back here, and makes one batch afterwards.
        await self._idle.wait()
        return await self._encode_with_others(chunk)

    async def _encode_batch(self, chunks: list[list[Tokens]]) -> list[Vectors]:
        self._idle.clear()
        try:
            texts = [tokens for chunk in chunks for tokens in chunk]
            vectors = np.empty((len(texts), self._encoder.dimensions), dtype=np.float32)
            for one_pass in passes([len(tokens) for tokens in texts]):
                padded = [texts[index] for index in one_pass]
                vectors[one_pass] = await _in_thread(self._computing, self._encoder.encode, padded)
            return np.split(vectors, np.cumsum([len(chunk) for chunk in chunks])[:-1])
        finally:
            self._idle.set()


class Encoder:
    """A model of sentence-transformers, loaded from its folder. Its weights are safetensors and it brings no code.

    Raises BadInput if the folder holds no such model or `dimensions` is not what it has.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        if not model.gpus:
            torch.set_num_threads(max(1, math.floor(model.cpus)))
        self._model = SentenceTransformer(
            str(model.folder),
            device="cuda" if model.gpus else "cpu",
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": "auto" if model.gpus else "float32"},
        )
        self._model.eval()
        self._tokenizer = self._model.tokenizer
        self._prompt = self._model.prompts.get(self._model.default_prompt_name or "") or ""
        self.max_tokens = int(self._model.max_seq_length or self._tokenizer.model_max_length)
        self.dimensions = self.encode(self.tokenize(["How long is a vector?"], truncate=True)).shape[1]
        if model.dimensions not in (None, self.dimensions):
            raise BadInput(
                f"the model {model.id!r} has vectors of {self.dimensions} dimensions, and its `dimensions` in the "
                f"config is {model.dimensions}"
            )

    def tokenize(self, texts: Sequence[Embeddable], truncate: bool) -> list[Tokens]:
        """The tokens of texts, of at most `max_tokens`; with `truncate` a longer text is cut, else it is BadInput.

        Not for several threads at once, as the tokenizer keeps whether it truncates.
        """
        words = [
            self._prompt + (text if isinstance(text, str) else self._text_of(n, text)) for n, text in enumerate(texts)
        ]
        length = dict(truncation=True, max_length=self.max_tokens) if truncate else dict(truncation=False)
        encoded = self._tokenizer(
            words, **length, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        tokens: list[Tokens] = encoded["input_ids"]
        for index, one in enumerate(tokens):
            if len(one) > self.max_tokens:
                raise BadInput(
                    f"text {index} has {len(one)} tokens; the model takes at most {self.max_tokens}: shorten it, or "
                    "ask for truncate: true"
                )
        return tokens

    def encode(self, texts: list[Tokens]) -> Vectors:
        """The vectors of tokenized texts, which are padded to one length."""
        import torch

        features = dict(self._tokenizer.pad({"input_ids": texts}, padding=True, return_tensors="pt"))
        features = {name: tensor.to(self._model.device) for name, tensor in features.items()}
        with torch.inference_mode():
            vectors = self._model(features)["sentence_embedding"]
        return vectors.float().cpu().numpy()  # type: ignore[no-any-return]

    def _text_of(self, index: int, tokens: list[int]) -> str:
        """The text of a text that is given in the model's tokens, without special ones."""
        known = len(self._tokenizer)
        for token in tokens:
            if token >= known:
                raise BadInput(f"text {index} has the token {token}; the model's vocabulary has {known}, from 0")
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        if not text:
            raise BadInput(f"text {index} has no tokens but special ones")
        return str(text)


def passes(lengths: list[int]) -> Iterator[list[int]]:
    """Which texts of a batch go through the model together, by their indices.

    They are sorted by their lengths in tokens, and none is padded to more than twice its own, unless it is short.
    """
    indices = sorted(range(len(lengths)), key=lengths.__getitem__)
    while indices:
        longest = 2 * max(SHORT_TOKENS, lengths[indices[0]])
        count = 1
        while (
            count < len(indices)
            and lengths[indices[count]] <= longest
            and lengths[indices[count]] * (count + 1) <= MAX_PASS_TOKENS
        ):
            count += 1
        yield indices[:count]
        indices = indices[count:]


def _texts_in(chunks: list[list[Tokens]]) -> int:
    return sum(len(chunk) for chunk in chunks)


async def _in_thread(threads: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)
