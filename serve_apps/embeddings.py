"""An embedding model as a Serve deployment: sentence-transformers, with the texts of several requests in one batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError
from ray import serve

from serve_apps.batching import Batches, Rows, Tokens, deployment_options, set_threads
from stack.api.wire import Wire, describe
from stack.config import EmbeddingModel
from stack.errors import BadInput
from stack.models import Embeddable, Embeddings, Failure


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one embedding model: its entry in the config."""
    try:
        model = EmbeddingApplication.model_validate(args).model
    except ValidationError as error:
        raise BadInput(f"args of an embedding model's application: {describe(error)}") from error
    return Embedder.options(**deployment_options(model)).bind(model)  # type: ignore[attr-defined, no-any-return]


class EmbeddingApplication(Wire):
    """The args of an embedding model's application."""

    model: EmbeddingModel


@serve.deployment
class Embedder:
    """Embeds texts."""

    def __init__(self, model: EmbeddingModel) -> None:
        self._encoder = Encoder(model)
        self._probe = self._encoder.tokenize(["Are you well?"], truncate=True)
        self._batches = Batches(model, self._encoder.encode)

    async def embed(self, texts: Sequence[Embeddable], truncate: bool) -> Embeddings | Failure:
        """The vectors of texts, in their order, or why they are refused (see stack.models.Engine)."""
        try:
            tokens = await self._batches.tokenized(self._encoder.tokenize, texts, truncate)
        except BadInput as error:
            return Failure(error.status, error.message, error.param)
        vectors = await self._batches.rows(tokens)
        if not np.isfinite(vectors).all():
            return Failure(500, "the model answered with numbers that are none (NaN or infinite)")
        return Embeddings(vectors, sum(len(one) for one in tokens))

    async def check_health(self) -> None:
        """Raises unless the model answers."""
        if not np.isfinite(await self._batches.rows_at_once(self._probe)).all():
            raise RuntimeError("the embedding model answers with numbers that are none (NaN or infinite)")


class Encoder:
    """A model of sentence-transformers, loaded from its folder. Its weights are safetensors and it brings no code.

    Raises BadInput if the folder holds no such model or `dimensions` is not what it has.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        from sentence_transformers import SentenceTransformer

        set_threads(model)
        self._model = SentenceTransformer(
            str(model.folder),
            device="cuda" if model.gpus else "cpu",
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": "auto" if model.gpus else "float32"},
        )
        self._model.eval()
        self.tokenizer = self._model.tokenizer
        self.prompt = self._model.prompts.get(self._model.default_prompt_name or "") or ""
        self.max_tokens = int(self._model.max_seq_length or self.tokenizer.model_max_length)
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
            self.prompt + (text if isinstance(text, str) else self._text_of(n, text)) for n, text in enumerate(texts)
        ]
        length = dict(truncation=True, max_length=self.max_tokens) if truncate else dict(truncation=False)
        encoded = self.tokenizer(
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

    def encode(self, texts: list[Tokens]) -> Rows:
        """The vectors of tokenized texts, which are padded to one length."""
        import torch

        features = dict(self.tokenizer.pad({"input_ids": texts}, padding=True, return_tensors="pt"))
        features = {name: tensor.to(self._model.device) for name, tensor in features.items()}
        with torch.inference_mode():
            vectors = self._model(features)["sentence_embedding"]
        return vectors.float().cpu().numpy()  # type: ignore[no-any-return]

    def _text_of(self, index: int, tokens: list[int]) -> str:
        """The text of a text that is given in the model's tokens, without special ones."""
        known = len(self.tokenizer)
        for token in tokens:
            if token >= known:
                raise BadInput(f"text {index} has the token {token}; the model's vocabulary has {known}, from 0")
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if not text:
            raise BadInput(f"text {index} has no tokens but special ones")
        return str(text)
