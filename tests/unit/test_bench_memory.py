"""The bench of memory banks: its arithmetic, and the stack that it measures."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import yaml

from scripts import bench_memory, bench_vectors
from scripts.bench_memory import (
    Process,
    figures_of_idle,
    figures_of_quality,
    figures_of_speed,
    nearest,
    recall_of,
    times_of,
)
from scripts.figures import Comparison, Figure
from scripts.local_stack import read_serve_file
from scripts.retrieval import Question


def test_the_nearest_are_those_of_the_greatest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "K", 2)
    angles = np.radians(np.arange(0, 360, 10))
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    queries = vectors[[3, 20]] @ np.array([[1, 0.05], [-0.05, 1]], dtype=np.float32)
    assert nearest(vectors, queries) == [{3, 4}, {20, 21}]


async def test_recall_is_the_share_of_the_nearest_that_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "K", 2)
    found = [[1, 2], [3, 9]]

    async def ask(number: int) -> list[int]:
        return found[number]

    share = await recall_of("an index", ask, [{1, 2}, {3, 4}], above=0.75)
    assert (share.right, share.of, share.share, share.met) == (3, 4, 0.75, False)


async def test_as_many_are_asked_at_once_as_there_are_readers() -> None:
    waiting, asked = 0, list[int]()
    everybody = asyncio.Event()

    async def ask(number: int) -> None:
        nonlocal waiting
        asked.append(number)
        waiting += 1
        if waiting == 3:
            everybody.set()
        await everybody.wait()

    assert len(await times_of(ask, range(10), 3)) == 10
    assert sorted(asked) == list(range(10))


async def test_times_are_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    async def ask(number: int) -> None:
        clock[0] += 0.001 * number

    monkeypatch.setattr(bench_memory.time, "perf_counter", lambda: clock[0])
    assert await times_of(ask, [1, 2, 5], 1) == pytest.approx([1, 2, 5])


def test_what_a_query_takes_longer_has_a_target_and_the_slowest_of_many_readers() -> None:
    figures = figures_of_speed([4, 5, 6], [6, 6.5, 90], [10.0] * 100, [14.0] * 100)
    over, many = figures[2], figures[-1]
    assert isinstance(over, Figure)
    assert isinstance(many, Comparison)
    assert (over.p50, over.met) == (1.5, True)
    assert (many.ratio, many.met) == (pytest.approx(1.4), True)
    assert not figures_of_speed([5, 5], [7.5, 7.5], [10, 10], [10, 10])[2].met
    assert not figures_of_speed([5, 5], [5, 5], [10, 10], [16, 16])[-1].met


QUESTIONS = [Question("1", "?", frozenset("a")), Question("2", "?", frozenset("b")), Question("3", "?", frozenset("c"))]


def test_hybrid_has_to_be_better_than_vector() -> None:
    right, wrong = [["a"], ["b"], ["c"]], [["x"], ["b"], ["x"]]
    comparisons, share = figures_of_quality(QUESTIONS, {"vector": wrong, "keyword": wrong, "hybrid": right})
    by_name = {one.name: one for one in comparisons}
    assert (by_name["nDCG@10, hybrid"].peer, by_name["nDCG@10, hybrid"].ours) == (pytest.approx(1 / 3), 1)
    assert all(one.met for one in comparisons)
    assert (share.right, share.of) == (2.5, 3)
    for hybrid in (wrong, [["x"], ["x"], ["x"]]):
        comparisons, _ = figures_of_quality(QUESTIONS, {"vector": wrong, "keyword": right, "hybrid": hybrid})
        assert [one.name for one in comparisons if not one.met] == ["nDCG@10, hybrid"]


def test_banks_that_are_loaded_miss_the_target() -> None:
    before = [Process("Gateway", 200, 0), Process("MemoryWriter", 100, 0)]
    after = [Process("Gateway", 202, 0), Process("MemoryWriter", 104, 0)]
    assert all(one.met for one in figures_of_idle(before, after))
    loaded = figures_of_idle(before, [Process("Gateway", 230, 0), Process("MemoryWriter", 100, 3)])
    assert [one.met for one in loaded] == [False, True, False]


def test_the_stack_that_is_measured_can_be_served_and_embeds(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(bench_memory.document(8_321)))
    config = read_serve_file(file).config
    assert [one.id for one in config.embedding_models] == [bench_memory.MODEL]


def test_texts_of_several_sentences_lie_between_those(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = "The first of the sentences, 38 letters.", "A second one, of 26 chars."
    monkeypatch.setattr(bench_vectors, "_sources", lambda _: iter([f"{long} {short}"]))
    assert set(bench_vectors.sentences()) == {long, short}
    texts, vectors = bench_vectors.with_more([long, short], np.eye(2, dtype=np.float32), 1)
    assert texts == [long, short, f"{long} {short}"]
    assert np.linalg.norm(vectors[2]) == pytest.approx(1)
    assert vectors[2, 0] / vectors[2, 1] == pytest.approx(len(long) / len(short))
    with pytest.raises(ValueError, match="have 1 texts of several sentences; 2 are asked for"):
        bench_vectors.with_more([long, short], np.eye(2, dtype=np.float32), 2)


def test_vectors_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_vectors, "home", lambda: tmp_path)
    monkeypatch.setattr(bench_vectors, "PART", 2)
    encoded = list[list[str]]()

    def encode(given: list[str]) -> bench_vectors.Vectors:
        encoded.append(given)
        return np.array([[float(one)] for one in given], dtype=np.float32)

    monkeypatch.setattr(bench_vectors, "encode", encode)
    for _ in range(2):
        assert bench_vectors.vectors_of(["1", "2", "3"]).tolist() == [[1], [2], [3]]
    assert encoded == [["1", "2"], ["3"]]
    assert bench_vectors.vectors_of(["1", "2", "4"]).tolist() == [[1], [2], [4]]
    assert encoded[2:] == [["4"]]
