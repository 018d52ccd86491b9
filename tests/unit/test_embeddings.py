"""Embeddings: how vectors are written and shortened, and the model behind them, in this process."""

import base64
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stack import embeddings
from stack.api.embeddings import EmbeddingsRequest, OpenAIEmbeddingsRequest
from stack.config import Config, EmbeddingModel
from stack.context import Context
from stack.errors import BadInput
from stack.models import Embeddings
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.batching import MAX_PASS_TOKENS, passes
    from serve_apps.embeddings import Encoder, build

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "france", "is", "paris", "##s", "one"]
DIMENSIONS = 16
MAX_TOKENS = 12


class FixedVectors(ScriptedEngine):
    """Answers with given vectors."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        super().__init__()
        self.vectors = vectors

    async def embed(self, model: object, texts: object, truncate: bool) -> Embeddings:
        return Embeddings(self.vectors, tokens=7)


def context_with(vectors: NDArray[np.float32], home: Path, store_url: str, **model: Any) -> Context:
    models = [{"id": "embedder", "path": "models/embedder", **model}]
    config = Config.parse(CONFIG | {"store": store_url, "embedding_models": models}, "the tests' config")
    return Context.open(config, engine=FixedVectors(vectors))


# Answers


async def test_numbers_are_written_exactly(home: Path, store_url: str) -> None:
    vectors = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    vectors[0, :4] = (0, -0.0, 1e-38, 3.4e38)
    context = context_with(vectors, home, store_url)
    try:
        stack = await embeddings.embeddings(context, EmbeddingsRequest(model="embedder", contents=["a"]))
        asked = OpenAIEmbeddingsRequest(model="embedder", input=["a"], encoding_format="base64")
        openai = json.loads(await embeddings.openai_embeddings(context, asked))
    finally:
        context.close()
    assert np.array_equal(np.array(json.loads(stack)["embeddings"], dtype=np.float32), vectors)
    for vector, data in zip(vectors, openai["data"], strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(data["embedding"]), dtype="<f4"), vector)
    assert openai["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_shortened_vectors_have_the_length_one_and_no_vector_stays_none() -> None:
    vectors = np.array([[3, 4, 12], [0, 0, 5]], dtype=np.float32)
    short = embeddings.shortened(vectors, 2)
    assert short.dtype == np.float32
    assert short.tolist() == pytest.approx(np.array([[0.6, 0.8], [0, 0]]))


# Config


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"id": "small"}, ["'small'", "more than once"]),
        ({"id": "gateway"}, ["'gateway'"]),
        ({"max_batch": 0}, ["max_batch", "1"]),
        ({"batch_wait_s": -1}, ["batch_wait_s", "-1"]),
        ({"min_replicas": 3, "max_replicas": 2}, ["max_replicas is 2", "at least min_replicas, 3"]),
        ({"target_ongoing_requests": 65}, ["target_ongoing_requests is 65", "64"]),
        ({"dimension": 3}, ["unknown key 'dimension'", "dimensions"]),
    ],
)
def test_a_wrong_embedding_model_in_the_config_is_refused(value: dict[str, Any], words: list[str]) -> None:
    model = {"id": "embedder", "path": "models/embedder"} | value
    with pytest.raises(BadInput) as caught:
        Config.parse(CONFIG | {"embedding_models": [model]}, "stack.yaml")
    for word in ("stack.yaml: ", *words):
        assert word in caught.value.message


def test_a_wrong_application_is_refused_in_one_line() -> None:
    with pytest.raises(BadInput, match="args of an embedding model's application: unknown key 'modell'"):
        build({"modell": {}})


def deployment_of(**entry: Any) -> Any:
    model = {"id": "embedder", "path": "models/embedder"} | entry
    return build({"model": model})._bound_deployment  # type: ignore[attr-defined]


def test_replicas_follow_the_load_between_their_bounds() -> None:
    deployment = deployment_of(
        min_replicas=0, max_replicas=3, target_ongoing_requests=5, max_ongoing_requests=9, max_queued_requests=7, cpus=2
    )
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (0, 3, 5)
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (9, 7)
    assert deployment.ray_actor_options["num_cpus"] == 2
    assert deployment.ray_actor_options["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == "1"


def test_without_bounds_there_is_one_replica() -> None:
    deployment = deployment_of(gpus=0.5)
    assert deployment._deployment_config.autoscaling_config is None
    assert deployment.num_replicas == 1
    assert deployment.ray_actor_options["num_gpus"] == 0.5


# Passes


@pytest.mark.parametrize(
    "lengths",
    [[1], [3] * 40, [256, 3, 100, 3, 17, 33, 256], [1, 10_000, 10_000, 1], list(range(1, 600))],
    ids=["one", "equal", "mixed", "long", "many"],
)
def test_passes_hold_each_text_once_and_are_bounded(lengths: list[int]) -> None:
    made = list(passes(lengths))
    assert sorted(index for one in made for index in one) == list(range(len(lengths)))
    for one in made:
        longest, shortest = max(lengths[index] for index in one), min(lengths[index] for index in one)
        assert longest <= 2 * max(16, shortest)
        assert longest * len(one) <= MAX_PASS_TOKENS or len(one) == 1


def test_short_texts_go_together() -> None:
    assert list(passes([30, 3, 20])) == [[1, 2, 0]]
    assert list(passes([256, 3, 256])) == [[1], [0, 2]]


# The model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few words with drawn weights."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("embedder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=MAX_TOKENS).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=DIMENSIONS, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=MAX_TOKENS,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(EmbeddingModel(id="tiny", path=str(folder)))


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_vectors_are_those_of_sentence_transformers(encoder: Encoder, folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["the capital of france is paris", "one", "paris is the capital", "one one one one"]
    ours = encoder.encode(encoder.tokenize(texts, truncate=False))
    assert ours == pytest.approx(SentenceTransformer(str(folder), device="cpu").encode(texts), abs=1e-6)


def test_what_the_model_is_like_is_found_in_its_folder(encoder: Encoder) -> None:
    assert (encoder.dimensions, encoder.max_tokens) == (DIMENSIONS, MAX_TOKENS)


def test_other_dimensions_in_the_config_are_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"'tiny' has vectors of 16 dimensions, .* is 17"):
        Encoder(EmbeddingModel(id="tiny", path=str(folder), dimensions=17))


def test_weights_that_are_a_pickle_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Encoder(EmbeddingModel(id="tiny", path=str(tmp_path)))


def test_a_text_has_one_vector_whatever_stands_beside_it(encoder: Encoder) -> None:
    texts = ["the capital of france is paris", "one", "paris is the capital", "one one one one one one one one"]
    tokens = encoder.tokenize(texts, truncate=False)
    together = encoder.encode(tokens)
    assert together.shape == (4, DIMENSIONS)
    assert together.dtype == np.float32
    for vector, one in zip(together, tokens, strict=True):
        (alone,) = encoder.encode([one])
        assert cosine(vector, alone) > 0.9999
    assert cosine(together[0], together[1]) < 0.9999


def test_lengths_are_in_tokens_with_the_special_ones(encoder: Encoder) -> None:
    assert [len(one) for one in encoder.tokenize(["one", "ones", "one " * 10], truncate=False)] == [3, 4, 12]


def test_a_text_that_is_too_long_is_named_with_both_lengths(encoder: Encoder) -> None:
    with pytest.raises(BadInput, match="text 1 has 13 tokens; the model takes at most 12") as caught:
        encoder.tokenize(["one", "one " * 11, "one " * 12], truncate=False)
    assert "truncate: true" in caught.value.message


def test_a_text_is_cut_where_that_is_asked_for_and_only_there(encoder: Encoder) -> None:
    cut, whole = encoder.tokenize(["one " * 30, "one"], truncate=True)
    assert len(cut) == MAX_TOKENS
    assert [cut] == encoder.tokenize(["one " * 10], truncate=False)
    assert [whole] == encoder.tokenize(["one"], truncate=False)
    with pytest.raises(BadInput, match="text 0 has 32 tokens"):
        encoder.tokenize(["one " * 30], truncate=False)


def test_tokens_are_the_text_that_they_stand_for(encoder: Encoder) -> None:
    (words,) = encoder.tokenize(["the capital of france is paris"], truncate=False)
    assert encoder.tokenize([words], truncate=False) == [words]
    assert encoder.tokenize([words[1:-1]], truncate=False) == [words]


def test_the_models_own_default_prompt_comes_before_each_text(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", prompts={"query": "the capital of "}, default_prompt_name="query"
    )
    model.save_pretrained(str(tmp_path), create_model_card=False)
    with_prompt = Encoder(EmbeddingModel(id="tiny", path=str(tmp_path)))
    tokens = with_prompt.tokenize(["france"], truncate=False)
    assert tokens == encoder.tokenize(["the capital of france"], truncate=False)
    assert with_prompt.encode(tokens) == pytest.approx(model.encode(["france"]), abs=1e-6)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([5, 13], "text 1 has the token 13; the model's vocabulary has 13, from 0"), ([2, 3], "text 1 has no tokens")],
)
def test_tokens_that_say_nothing_are_refused(encoder: Encoder, tokens: list[int], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        encoder.tokenize(["one", tokens], truncate=False)
