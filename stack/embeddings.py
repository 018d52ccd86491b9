"""Embeddings of texts, at both doors. Answers are JSON as bytes, written from the vectors as they are."""

import asyncio
import base64
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from stack.api.embeddings import EmbeddingsRequest, OpenAIEmbeddingsRequest
from stack.config import EmbeddingModel
from stack.context import Context
from stack.errors import BadInput
from stack.models import Embeddable, Embeddings

Vectors = NDArray[np.float32]


async def embeddings(context: Context, request: EmbeddingsRequest) -> bytes:
    """The vectors of the contents, as the JSON of an EmbeddingsResponse.

    Raises NotFound for an unknown model, BadInput for one that makes no embeddings and for a text over the model's
    length, which is named by its index, Unavailable.
    """
    embedded = await _embed(context, request.model, request.texts, request.truncate, "contents")
    return await asyncio.to_thread(_stack_answer, embedded.vectors)


async def openai_embeddings(context: Context, request: OpenAIEmbeddingsRequest) -> bytes:
    """The vectors of the input, as the JSON of an OpenAIEmbeddingsResponse. Raises as `embeddings` does.

    BadInput too for `dimensions` that the model's vectors do not have and cannot be shortened to.
    """
    model = await context.models.find_embedding_model(request.model)
    if model.dimensions is not None:  # known before the work
        _require_dimensions(model, model.dimensions, request.dimensions)
    embedded = await _embed(context, request.model, request.input, request.truncate, "input")
    _require_dimensions(model, embedded.vectors.shape[1], request.dimensions)
    return await asyncio.to_thread(_openai_answer, request, embedded)


def shortened(vectors: Vectors, dimensions: int) -> Vectors:
    """The beginnings of vectors, made as long as a unit again (Kusupati et al. 2022, arXiv 2205.13147)."""
    beginnings = vectors[:, :dimensions]
    lengths = np.linalg.norm(beginnings, axis=1, keepdims=True)
    scaled: Vectors = beginnings / np.where(lengths > 0, lengths, np.float32(1))
    return scaled


async def _embed(context: Context, model: str, texts: Sequence[Embeddable], truncate: bool, param: str) -> Embeddings:
    """The vectors of texts; what is wrong with them is said to be at `param`."""
    try:
        return await context.models.embed(model, texts, truncate)
    except BadInput as error:
        raise BadInput(error.message, param=error.param or param, code=error.code) from error


def _require_dimensions(model: EmbeddingModel, given: int, asked: int | None) -> None:
    if asked in (None, given) or (model.matryoshka and asked is not None and asked < given):
        return
    allowed = f"1 to {given}" if model.matryoshka else f"{given} alone, as its vectors cannot be shortened"
    raise BadInput(f"dimensions is {asked}; allowed for the model {model.id!r}: {allowed}", param="dimensions")


def _stack_answer(vectors: Vectors) -> bytes:
    return b'{"embeddings":[' + b",".join(_numbers(vectors)) + b"]}"


def _openai_answer(request: OpenAIEmbeddingsRequest, embedded: Embeddings) -> bytes:
    vectors = embedded.vectors
    if request.dimensions is not None and request.dimensions < vectors.shape[1]:
        vectors = shortened(vectors, request.dimensions)
    written = _in_base64(vectors) if request.encoding_format == "base64" else _numbers(vectors)
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, one) for index, one in enumerate(written)
    )
    usage = to_json({"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens})
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, to_json(request.model), usage)


def _numbers(vectors: Vectors) -> Iterator[bytes]:
    """Each vector as a list in JSON. One by one, as nothing else runs in this process while one is written."""
    return (to_json(vector.tolist()) for vector in vectors)


def _in_base64(vectors: Vectors) -> Iterator[bytes]:
    return (b'"%b"' % base64.b64encode(vector.tobytes()) for vector in vectors.astype("<f4"))
