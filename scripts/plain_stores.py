"""Chroma and FAISS, beside which `scripts/bench memory` measures memory banks.

    python scripts/plain_stores.py chroma|faiss FOLDER ALONE READERS K OUTPUT

It runs in an environment of its own, which has these two and nothing of the stack. FOLDER holds `vectors.npy` and
`queries.npy`, of unit length, and `texts.json`. OUTPUT becomes a JSON file with the milliseconds of ALONE queries one
after the other, of all of them by so many READERS at once, and the numbers of the K vectors that each query has found.
Both search HNSW graphs with the settings that they come with. Chroma answers with the texts, FAISS with numbers alone.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Ask = Callable[[Any], list[int]]


def main() -> None:
    name, folder, alone, readers, k, output = sys.argv[1:]
    vectors, queries = (np.load(Path(folder) / f"{one}.npy", allow_pickle=False) for one in ("vectors", "queries"))
    texts = json.loads((Path(folder) / "texts.json").read_text())
    ask = chroma(Path(folder), vectors, texts, int(k)) if name == "chroma" else faiss(vectors, int(k))
    for query in queries[:50]:
        ask(query)  # warms up
    first = [_timed(ask, query)[0] for query in queries[: int(alone)]]
    with ThreadPoolExecutor(int(readers)) as threads:
        answers = list(threads.map(lambda query: _timed(ask, query), queries))
    found = {"alone": first, "many": [one[0] for one in answers], "found": [one[1] for one in answers]}
    Path(output).write_text(json.dumps(found))


def chroma(folder: Path, vectors: Any, texts: list[str], k: int) -> Ask:
    import chromadb

    client = chromadb.PersistentClient(str(folder / "chroma"), chromadb.Settings(anonymized_telemetry=False))
    chunks = client.create_collection("chunks", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
    for start in range(0, len(texts), 5_000):
        part = slice(start, start + 5_000)
        ids = [str(number) for number in range(len(texts))[part]]
        chunks.add(ids=ids, embeddings=vectors[part], documents=texts[part])

    def ask(query: Any) -> list[int]:
        found = chunks.query(query_embeddings=[query], n_results=k, include=["documents", "distances"])
        return [int(one) for one in found["ids"][0]]

    return ask


def faiss(vectors: Any, k: int) -> Ask:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)

    def ask(query: Any) -> list[int]:
        numbers: list[int] = index.search(query[None], k)[1][0].tolist()
        return numbers

    return ask


def _timed(ask: Ask, query: Any) -> tuple[float, list[int]]:
    start = time.perf_counter()
    found = ask(query)
    return 1_000 * (time.perf_counter() - start), found


if __name__ == "__main__":
    main()
