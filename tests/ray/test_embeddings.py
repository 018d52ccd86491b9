"""The real embedding model at both doors: by plain HTTP, by the RFC's own client, and by OpenAI's."""

import asyncio
import base64
import struct

import httpx
import numpy as np
import openai
import pytest
from llama_stack import LlamaStack
from numpy.typing import NDArray

from tests.running_stack import MODEL, Stack

EMBEDDER = "all-MiniLM-L6-v2"
DIMENSIONS = 384
MAX_TOKENS = 256
FRANCE, PARIS, ENGINES = "What is the capital of France?", "Paris is the capital of France.", "Diesel engines need oil."
TEXTS = [f"The number {number} is followed by {number + 1}." * (1 + number % 7) for number in range(40)]


def embed(client: httpx.Client, contents: list[str], **more: object) -> NDArray[np.float64]:
    reply = client.post("/inference/embeddings", json={"model": EMBEDDER, "contents": contents, **more})
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["embeddings"])


def test_vectors_have_the_length_one_and_like_texts_are_near(client: httpx.Client) -> None:
    vectors = embed(client, [FRANCE, PARIS, ENGINES])
    assert vectors.shape == (3, DIMENSIONS)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    near, far, farther = vectors[0] @ vectors[1], vectors[0] @ vectors[2], vectors[1] @ vectors[2]
    assert near > 0.7
    assert max(far, farther) < 0.2


def test_a_content_in_parts_is_one_text(client: httpx.Client) -> None:
    body = {"request": {"model": EMBEDDER, "contents": [["Paris is the ", "capital of France."], PARIS]}}
    one, other = client.post("/inference/embeddings", json=body).json()["embeddings"]
    assert one == pytest.approx(other, abs=1e-6)


def test_requests_at_once_get_the_vectors_that_each_gets_alone(stack: Stack, client: httpx.Client) -> None:
    alone = np.concatenate([embed(client, [text]) for text in TEXTS])

    async def at_once() -> list[list[list[float]]]:
        async with httpx.AsyncClient(base_url=stack.url, timeout=120) as http:

            async def ask(texts: list[str]) -> list[list[float]]:
                reply = await http.post("/inference/embeddings", json={"model": EMBEDDER, "contents": texts})
                assert reply.status_code == 200, reply.text
                embeddings: list[list[float]] = reply.json()["embeddings"]
                return embeddings

            return await asyncio.gather(*(ask([text]) for text in TEXTS), ask(TEXTS))

    *single, together = asyncio.run(at_once())
    assert np.concatenate(single) == pytest.approx(alone, abs=1e-5)
    assert np.array(together) == pytest.approx(alone, abs=1e-5)


def test_a_text_over_the_models_length_is_refused_with_both_lengths(client: httpx.Client) -> None:
    for path, field in (("/inference/embeddings", "contents"), ("/v1/embeddings", "input")):
        reply = client.post(path, json={"model": EMBEDDER, field: ["short", "word " * 300]})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert f"text 1 has 302 tokens; the model takes at most {MAX_TOKENS}" in error["message"]
        assert error["param"] == field


def test_it_is_cut_where_that_is_asked_for(client: httpx.Client) -> None:
    cut, short = embed(client, ["word " * 300, "word " * (MAX_TOKENS - 2)], truncate=True)
    assert cut == pytest.approx(short, abs=1e-5)


def test_many_texts_in_one_request(client: httpx.Client) -> None:
    vectors = embed(client, [f"text {number % 3}" for number in range(2_048)])
    assert vectors.shape == (2_048, DIMENSIONS)
    assert vectors[3:6] == pytest.approx(vectors[:3], abs=1e-5)


def test_models_of_the_wrong_kind_are_400_and_the_right_ones_are_named(client: httpx.Client) -> None:
    reply = client.post("/v1/embeddings", json={"model": MODEL, "input": "a"})
    assert (reply.status_code, EMBEDDER in reply.json()["error"]["message"]) == (400, True)
    message = {"role": "user", "content": "a"}
    reply = client.post("/v1/chat/completions", json={"model": EMBEDDER, "messages": [message]})
    assert (reply.status_code, MODEL in reply.json()["error"]["message"]) == (400, True)


def test_the_rfc_client(stack: Stack, client: httpx.Client) -> None:
    with httpx.Client(base_url=stack.url, timeout=120) as http:
        rfc = LlamaStack(base_url=stack.url, http_client=http)
        answer = rfc.inference.embeddings.create(model=EMBEDDER, contents=[FRANCE, PARIS])
    assert np.array(answer.embeddings) == pytest.approx(embed(client, [FRANCE, PARIS]), abs=1e-5)


def test_the_openai_client(stack: Stack, client: httpx.Client) -> None:
    expected = embed(client, [FRANCE, PARIS])
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none") as api:
        assert EMBEDDER in [model.id for model in api.models.list()]
        # The client asks for base64 of its own accord and decodes it.
        answer = api.embeddings.create(model=EMBEDDER, input=[FRANCE, PARIS])
        assert np.array([one.embedding for one in answer.data]) == pytest.approx(expected, abs=1e-5)
        assert (answer.model, [one.index for one in answer.data]) == (EMBEDDER, [0, 1])
        # 7 and 7 tokens with the marks, and the two special ones of each.
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (18, 18)
        floats = api.embeddings.create(model=EMBEDDER, input=FRANCE, encoding_format="float")
        assert floats.data[0].embedding == pytest.approx(expected[0], abs=1e-5)
        written = api.embeddings.create(model=EMBEDDER, input=FRANCE, encoding_format="base64").data[0].embedding
        numbers = struct.unpack(f"<{DIMENSIONS}f", base64.b64decode(str(written)))
        assert numbers == pytest.approx(expected[0], abs=1e-5)
        with pytest.raises(openai.BadRequestError, match="cannot be shortened"):
            api.embeddings.create(model=EMBEDDER, input=FRANCE, dimensions=8)
        with pytest.raises(openai.BadRequestError, match="text 0 has the token 1000000"):
            api.embeddings.create(model=EMBEDDER, input=[1_000_000])


def test_tokens_are_in_the_models_own_vocabulary(client: httpx.Client) -> None:
    body = {
        "model": EMBEDDER,
        "input": [[7592, 2088], [101, 7592, 2088, 102]],
    }  # hello world, without its marks and with
    answer = client.post("/v1/embeddings", json=body).json()
    expected = embed(client, ["hello world"])[0]
    for data in answer["data"]:
        assert data["embedding"] == pytest.approx(expected, abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == 8
