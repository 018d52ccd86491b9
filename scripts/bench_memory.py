"""What memory banks cost and find, beside LanceDB called directly on the same vectors.

    scripts/bench memory [--only PART …] [--json FILE]

speed    queries of a vector bank of 100,000 chunks by the stack's own behaviour, and of a table of the same texts,
         vectors and index by LanceDB's own asynchronous API, in turns in this process: one after the other, and by 32
         readers at once. The vector of a query is given at once on both sides. Queries and 40,000 chunks are real, the
         other vectors are interpolated between those (scripts/bench_vectors.py)
recall   how many of the 10 nearest chunks the bank's index finds, of those of an exact search of the same vectors
peers    the same queries of Chroma and of FAISS, without a target, in an environment of their own, which is made in
         STACK_HOME/bench with the first run: what they need is not what the stack has
ingest   chunks a second that /memory_bank/insert takes of a served stack, from documents of the labelled set, beside
         the embedding model called in a loop on the same chunks in a process of its own; both compute with one thread
quality  nDCG@10 and recall@10 of a bank by vector, keyword and hybrid on the labelled set (scripts/retrieval.py): 10
         different documents, each where its best chunk is
idle     the memory of the gateway and of the writer of a stack that has been opened with 1,000 banks, beside those of
         one without any, and the banks' files that they have open

The exit status is 1 if a target is missed.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS, HnswSq

from scripts import bench_vectors, local_stack, retrieval
from scripts.bench_servers import BenchFailed, command_of, free_port, local_model, processes_of
from scripts.bench_trainings import enter_home, prepared_data, running_ray, say
from scripts.bench_vectors import Vectors
from scripts.figures import (
    Comparison,
    Figure,
    Share,
    figure,
    write_comparisons,
    write_json,
    write_shares,
    write_table,
)
from stack.api.memory_banks import CreateMemoryBankRequest, QueryDocumentsRequest
from stack.config import GATEWAY, Config, EmbeddingModel, home
from stack.context import Context
from stack.memory_banks import banks, search
from stack.memory_banks.banks import Memory
from stack.memory_banks.chunking import chunks, token_counter
from stack.memory_banks.reading import read
from stack.memory_banks.rows import Chunk, Document
from stack.memory_banks.writer import BankWriter
from stack.models import Embeddable, Embeddings
from stack.store import MemoryBank

PARTS = ("speed", "recall", "peers", "ingest", "quality", "idle")
CHUNKS, CHUNKS_A_DOCUMENT, DOCUMENTS_A_WRITE = 100_000, 10, 1_000
QUERIES, ALONE, READERS, K, TURNS = 1_000, 100, 32, 10, 3
# Of the labelled set: tokens of a chunk, and how many chunks are asked for, so that there are 10 documents among them.
CHUNK_TOKENS, ASKED_CHUNKS = 128, 100
BANKS = 1_000
CALLS, AT_ONCE, BATCH = 20, 4, 32
START_S, LOOK_S = 300.0, 5.0
# Targets: of the median over LanceDB's, of the ratio of p99, of that of chunks, of recall, of memory.
MOST_OVER_MS, MOST_P99, LEAST_CHUNKS, RECALL, MOST_MEMORY = 2.0, 1.5, 0.9, 0.95, 1.05
MORE = math.nextafter(1, 2)  # the least ratio that is better than as good
PEERS = ("chromadb==1.5.9", "faiss-cpu==1.15.1")
MODEL = "all-MiniLM-L6-v2"
Figures = list[Comparison | Figure | Share]
Ask = Callable[[int], Awaitable[object]]  # asks the query of this number


def main() -> int:
    arguments = _arguments()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells each request once Ray Serve has been imported
    only = set(arguments.only)
    figures: Figures = []
    try:
        prepared_data("retrieval")
        if only & {"speed", "recall", "peers"}:
            figures += of_many_chunks(only)
        if "quality" in only:
            figures += asyncio.run(quality())
        if only & {"ingest", "idle"}:
            figures += served(only)
    except (BenchFailed, local_stack.StartFailed, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:  # what was measured before a part failed, too
        if arguments.json is not None:
            write_json(arguments.json, figures, bench="memory")
    return 0 if all(one.met for one in figures) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="measure these parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


# Many chunks


def of_many_chunks(only: set[str]) -> Figures:
    """Measures those of the parts that ask 100,000 chunks, and prints them."""
    say("the texts and their vectors: minutes, where they are not there from an earlier run")
    texts, vectors = many_chunks()
    exact = nearest(vectors[:CHUNKS], vectors[CHUNKS:])
    figures: Figures = []
    with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
        if only & {"speed", "recall"}:
            figures += asyncio.run(ours_beside_lancedb(Path(folder), texts, vectors, exact, only))
        if "peers" in only:
            figures += peers(Path(folder), texts, vectors, exact)
    return figures


def many_chunks() -> tuple[list[str], Vectors]:
    """So many chunks and, behind them, queries, which are real ones, as are the chunks as far as there are more."""
    sentences = bench_vectors.sentences()
    vectors = bench_vectors.vectors_of(sentences)
    more = CHUNKS + QUERIES - len(sentences)
    chunk_texts, chunk_vectors = bench_vectors.with_more(sentences[QUERIES:], vectors[QUERIES:], more)
    return chunk_texts + sentences[:QUERIES], np.concatenate([chunk_vectors, vectors[:QUERIES]])


async def ours_beside_lancedb(
    folder: Path, texts: list[str], vectors: Vectors, exact: list[set[int]], only: set[str]
) -> Figures:
    figures: Figures = []
    with opened_home(folder, dict(zip(texts[CHUNKS:], vectors[CHUNKS:], strict=True))) as here:
        say(f"writing {CHUNKS} chunks")
        bank = await here.bank()
        await fill(here, bank, texts[:CHUNKS], vectors[:CHUNKS])

        async def ask(number: int) -> list[int]:
            params: Any = {"mode": "vector", "max_chunks": K}
            request = QueryDocumentsRequest(bank_id=bank.id, query=texts[CHUNKS + number], params=params)
            found = await banks.query(here.context, here.memory, request)
            return [int(chunk.document_id) * CHUNKS_A_DOCUMENT + chunk.position for chunk in found.chunks]

        direct = await directly(folder / "lancedb", texts[:CHUNKS], vectors)
        if "recall" in only:
            say("recall")
            shares = [
                await recall_of("the bank's index", ask, exact, RECALL),
                await recall_of("LanceDB called directly", direct, exact),
            ]
            figures += shares
            print(write_shares(shares), end="\n\n", flush=True)
        if "speed" in only:
            say("speed")
            figures += await speed(direct, ask)
    return figures


async def speed(direct: Ask, ours: Ask) -> Figures:
    """The times of both, in turns, so that both have their share of what else the machine does."""
    asked: dict[str, Ask] = {"LanceDB": direct, "the bank": ours}
    alone: dict[str, list[float]] = {name: [] for name in asked}
    many: dict[str, list[float]] = {name: [] for name in asked}
    for ask in asked.values():
        await times_of(ask, range(50), 1)  # warms up
    for turn in range(TURNS):
        for name, ask in asked.items():
            alone[name] += await times_of(ask, range(turn * ALONE, (turn + 1) * ALONE), 1)
        for name, ask in asked.items():
            many[name] += await times_of(ask, range(QUERIES), READERS)
    figures = figures_of_speed(alone["LanceDB"], alone["the bank"], many["LanceDB"], many["the bank"])
    print(write_table([one for one in figures if isinstance(one, Figure)]), end="\n\n")
    print(write_comparisons([one for one in figures if isinstance(one, Comparison)], "LanceDB", "the bank"), end="\n\n")
    return figures


def figures_of_speed(
    direct: list[float], ours: list[float], direct_many: list[float], ours_many: list[float]
) -> Figures:
    """From milliseconds of single queries and of those of many readers."""
    over = statistics.median(ours) - statistics.median(direct)
    peer, own = (figure("", "ms", times).p99 or 0.0 for times in (direct_many, ours_many))
    return [
        figure("a query alone, LanceDB called directly", "ms", direct),
        figure("a query alone, of the bank", "ms", ours),
        Figure("the bank's over LanceDB's own", "ms", over, most=MOST_OVER_MS),
        figure(f"{READERS} readers, LanceDB called directly", "ms", direct_many),
        figure(f"{READERS} readers, of the bank", "ms", ours_many),
        Comparison(f"p99 with {READERS} readers", "ms", peer, own, most=MOST_P99),
    ]


async def times_of(ask: Ask, numbers: Sequence[int], at_once: int) -> list[float]:
    """The milliseconds that each query takes, where so many are asked at once."""
    waiting, times = iter(numbers), list[float]()

    async def reader() -> None:
        for number in waiting:
            start = time.perf_counter()
            await ask(number)
            times.append(1_000 * (time.perf_counter() - start))

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(reader())
    return times


async def recall_of(
    name: str, ask: Callable[[int], Awaitable[list[int]]], exact: list[set[int]], above: float | None = None
) -> Share:
    found = sum([len(set(await ask(number)) & nearest) for number, nearest in enumerate(exact)])
    return Share(f"recall@{K} of {name}", found, K * len(exact), above)


def nearest(vectors: Vectors, queries: Vectors) -> list[set[int]]:
    """The numbers of the K vectors that are nearest to each query, by exact search. All are of unit length."""
    found = list[set[int]]()
    for first in range(0, len(queries), 100):
        scores = queries[first : first + 100] @ vectors.T
        found += [set(row) for row in np.argpartition(-scores, K, axis=1)[:, :K].tolist()]
    return found


async def directly(folder: Path, texts: list[str], vectors: Vectors) -> Callable[[int], Awaitable[list[int]]]:
    """Asks LanceDB itself for what a bank is asked for: on a table of its own, with the banks' index and settings."""
    connection = await lancedb.connect_async(folder)
    kept = await connection.create_table("chunks", _arrow(texts, vectors[: len(texts)]))
    await kept.create_index("vector", config=HnswSq(distance_type="cosine"))
    await kept.create_index("text", config=FTS())

    async def ask(number: int) -> list[int]:
        query = kept.query().nearest_to(vectors[len(texts) + number]).distance_type("cosine")
        query = query.minimum_nprobes(search.PROBES).maximum_nprobes(0).ef(search.CANDIDATES)
        found = await query.limit(K).select(["number", "text", "_distance"]).to_arrow()
        numbers: list[int] = found["number"].to_pylist()
        return numbers

    return ask


def _arrow(texts: list[str], vectors: Vectors) -> pa.Table:
    flat = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    return pa.table({"number": pa.array(range(len(texts)), pa.int32()), "text": texts, "vector": flat})


# Chroma and FAISS


def peers(folder: Path, texts: list[str], vectors: Vectors, exact: list[set[int]]) -> Figures:
    """Both in an environment of their own."""
    python = _environment_of_peers()
    np.save(folder / "vectors.npy", vectors[:CHUNKS], allow_pickle=False)
    np.save(folder / "queries.npy", vectors[CHUNKS:], allow_pickle=False)
    (folder / "texts.json").write_text(json.dumps(texts[:CHUNKS]))
    figures: list[Figure] = []
    shares: list[Share] = []
    for name in ("chroma", "faiss"):
        say(name)
        output = folder / f"{name}.out.json"
        script = Path(__file__).with_name("plain_stores.py")
        subprocess.run(
            [python, script, name, folder, str(ALONE * TURNS), str(READERS), str(K), output],
            check=True, env=os.environ | {"ANONYMIZED_TELEMETRY": "False", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = json.loads(output.read_text())
        figures += [
            figure(f"a query alone, {name}", "ms", found["alone"]),
            figure(f"{READERS} readers, {name}", "ms", found["many"]),
        ]
        right = sum(len(set(one) & near) for one, near in zip(found["found"], exact, strict=True))
        shares.append(Share(f"recall@{K} of {name}", right, K * len(exact)))
    print(f"{write_table(figures)}\n\n{write_shares(shares)}\n", flush=True)
    return [*figures, *shares]


def _environment_of_peers() -> Path:
    folder = home() / "bench" / "-".join(("stores", *(one.replace("==", "-") for one in PEERS)))
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        say(f"installing {' and '.join(PEERS)} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        (folder / "installed").touch()
    return python


# How good the answers are


async def quality() -> Figures:
    """Scores the modes of a bank on the labelled set, and prints it."""
    say("quality")
    source = prepared_data("retrieval")
    documents, questions = retrieval.read_documents(source), retrieval.read_questions(source)
    cut = {document.id: chunks_of(document) for document in documents}
    texts = [chunk.text for of_document in cut.values() for chunk in of_document]
    vectors = bench_vectors.vectors_of(texts + [question.text for question in questions])
    given = {question.text: vector for question, vector in zip(questions, vectors[len(texts) :], strict=True)}
    ends = np.cumsum([len(one) for one in cut.values()])
    parts = np.split(vectors[: len(texts)], ends[:-1])
    ready = [_document(key, cut[key], part) for key, part in zip(cut, parts, strict=True)]
    found: dict[str, list[list[str]]] = {}
    with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder, opened_home(Path(folder), given) as here:
        bank = await here.bank()
        await here.writer.write(bank, ready, replace=False)
        await here.writer.look_after()
        await here.writer.until_built()
        for mode in ("vector", "keyword", "hybrid"):
            found[mode] = []
            for question in questions:
                params: Any = {"mode": mode, "max_chunks": ASKED_CHUNKS}
                request = QueryDocumentsRequest(bank_id=bank.id, query=question.text, params=params)
                hits = (await banks.query(here.context, here.memory, request)).chunks
                found[mode].append(retrieval.documents_of([hit.document_id for hit in hits]))
    comparisons, share = figures_of_quality(questions, found)
    print(f"{len(questions)} questions, {len(documents)} documents, {len(texts)} chunks of {CHUNK_TOKENS} tokens\n")
    print(f"{write_comparisons(comparisons, 'vector', 'the mode')}\n\n{write_shares([share])}\n", flush=True)
    return [*comparisons, share]


def figures_of_quality(
    questions: Sequence[retrieval.Question], found: dict[str, list[list[str]]]
) -> tuple[list[Comparison], Share]:
    """Keyword and hybrid beside vector, from the documents that each mode has found for each question."""

    def scores(mode: str, score: Callable[..., float]) -> list[float]:
        return [score(ids, question.relevant, K) for ids, question in zip(found[mode], questions, strict=True)]

    comparisons = [
        Comparison(
            f"{name}@{K}, {mode}", "", statistics.fmean(scores("vector", score)), statistics.fmean(scores(mode, score)),
            least=MORE if (mode, name) == ("hybrid", "nDCG") else None,
        )
        for mode in ("keyword", "hybrid")
        for name, score in (("nDCG", retrieval.ndcg), ("recall", retrieval.recall))
    ]  # fmt: skip
    pairs = list(zip(scores("vector", retrieval.ndcg), scores("hybrid", retrieval.ndcg), strict=True))
    better = sum(1.0 if hybrid > vector else 0.5 if hybrid == vector else 0.0 for vector, hybrid in pairs)
    return comparisons, Share(f"questions that hybrid answers better, by nDCG@{K}", better, len(pairs))


def chunks_of(document: retrieval.Document) -> tuple[Chunk, ...]:
    """As a vector bank cuts it."""
    text = read(document.text.encode(), "text/markdown", document.id)
    return chunks(text, CHUNK_TOKENS, 0, token_counter(home() / bench_vectors.MODEL))


# A served stack


def served(only: set[str]) -> Figures:
    """Measures those of the parts that need a stack, and prints them."""
    documents = retrieval.read_documents(prepared_data("retrieval"))
    figures: Figures = []
    with home_of_its_own(), serving() as url:
        before = idle_processes(home())
        if "ingest" in only:
            say("ingest")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as peer:
                rate = compare_ingest(url, documents, peer)
            figures.append(rate)
            print(write_comparisons([rate], "the model in a loop", "inserts"), end="\n\n", flush=True)
    if "idle" in only:
        say(f"{BANKS} banks")
        with home_of_its_own():
            asyncio.run(fill_banks(home()))
            with serving():
                after = idle_processes(home())
        figures += (found := figures_of_idle(before, after))
        print(write_comparisons([one for one in found if isinstance(one, Comparison)], "no bank", f"{BANKS} banks"))
        print(f"\n{write_table([one for one in found if isinstance(one, Figure)])}", flush=True)
    return figures


def compare_ingest(url: str, documents: list[retrieval.Document], peer: ProcessPoolExecutor) -> Comparison:
    """In turns, so that both have their share of what else the machine does. Each turn has a bank of its own."""
    texts = [chunk.text for document in documents for chunk in chunks_of(document)]
    direct, inserted = list[float](), list[float]()
    for _ in range(TURNS):
        direct.append(peer.submit(rate_directly, model(), texts).result())
        inserted.append(len(texts) / seconds_of_inserts(url, documents))
    peers, ours = statistics.median(direct), statistics.median(inserted)
    return Comparison(f"chunks a second, {AT_ONCE} inserts at once", "chunks/s", peers, ours, least=LEAST_CHUNKS)


def seconds_of_inserts(url: str, documents: Sequence[retrieval.Document]) -> float:
    """How long it takes to insert documents into a new bank, in CALLS calls of which AT_ONCE are sent at once."""
    rows = [
        {"document_id": one.id, "content": one.text, "mime_type": "text/markdown", "metadata": {}} for one in documents
    ]
    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        made = _answer(client.post("/memory_banks/create", json={"name": "bench", "config": CONFIG}))

        def insert(part: list[Any]) -> None:
            _answer(client.post("/memory_bank/insert", json={"bank_id": made["bank_id"], "documents": part}))

        insert(rows[:1])  # the table is there, and the model awake
        start = time.perf_counter()
        list(threads.map(insert, [rows[number::CALLS] for number in range(CALLS)]))
        return time.perf_counter() - start


def _answer(reply: httpx.Response) -> Any:
    if reply.status_code != 200:
        raise BenchFailed(f"{reply.request.url.path} answers with {reply.status_code}: {reply.text[:500]}")
    return reply.json()


def rate_directly(model: EmbeddingModel, texts: list[str]) -> float:
    """Texts a second of a loop over batches."""
    from serve_apps.embeddings import Encoder

    encoder = Encoder(model)
    encoder.encode(encoder.tokenize(texts[:BATCH], truncate=True))
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        encoder.encode(encoder.tokenize(texts[first : first + BATCH], truncate=True))
    return len(texts) / (time.perf_counter() - start)


@dataclass(frozen=True)
class Process:
    """One of the stack's processes that reach banks: its own memory in MB, and the files of banks that it has open."""

    name: str
    private_mb: float
    open_files: int


def idle_processes(folder: Path) -> list[Process]:
    """The gateway and the writer, once their memory no longer grows."""
    before = _processes(folder)
    while True:
        time.sleep(LOOK_S)
        now = _processes(folder)
        if all(one.private_mb < 1.01 * other.private_mb for one, other in zip(now, before, strict=True)):
            return now
        before = now


def _processes(folder: Path) -> list[Process]:
    found = list[Process]()
    for name in ("Gateway", "MemoryWriter"):
        processes = [one for one in processes_of(folder) if f"ServeReplica:{GATEWAY}:{name}" in command_of(one)]
        if len(processes) != 1:
            raise BenchFailed(f"there are {len(processes)} processes of {name}")
        mapped = {one.path for one in processes[0].memory_maps()} | {one.path for one in processes[0].open_files()}
        within = str(folder / "memory_banks") + os.sep
        of_banks = sum(path.startswith(within) and not path.endswith("/.writer") for path in mapped)
        found.append(Process(name, processes[0].memory_full_info().uss / 2**20, of_banks))
    return found


def figures_of_idle(before: list[Process], after: list[Process]) -> Figures:
    return [
        *(
            Comparison(f"memory of {one.name} alone", "MB", one.private_mb, other.private_mb, most=MOST_MEMORY)
            for one, other in zip(before, after, strict=True)
        ),
        Figure("files of banks that are open", "", sum(one.open_files for one in after), most=0),
    ]


def model() -> EmbeddingModel:
    return EmbeddingModel(id=MODEL, path=bench_vectors.MODEL, dimensions=384, max_batch=BATCH)


def document(port: int) -> dict[str, Any]:
    """The Serve config file of a stack with the embedding model; the language model is a scripted one."""
    language = local_model(id="scripted", adapters=0, cpus=0.1).model_dump(mode="json", exclude_unset=True)
    embedding = model().model_dump(mode="json", exclude_unset=True)
    args = {"models": [language], "embedding_models": [embedding]}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            _application(GATEWAY, "serve_apps.gateway:build", "/", args),
            _application("scripted", local_stack.SCRIPTED_IMPORT_PATH, None, {"model": language}),
            _application(MODEL, local_stack.EMBEDDINGS_IMPORT_PATH, None, {"model": embedding}),
        ],
    }


def _application(name: str, import_path: str, route_prefix: str | None, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "import_path": import_path, "route_prefix": route_prefix, "args": args}


@contextmanager
def home_of_its_own() -> Iterator[None]:
    """This process has another STACK_HOME meanwhile, with the models of the one that it has."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
        enter_home(Path(folder))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def serving() -> Iterator[str]:
    """That stack, on a Ray of this process's own, from when it answers on. Gives its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running_ray() as address:
        from ray import serve

        try:
            local_stack.deploy(document(port), address, lambda: False)
            local_stack.wait_until_ready(url, START_S, lambda: False, lambda _: None)
            yield url
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]  # what this process knows of it, too: the next Ray has another one


# Banks in this process


class GivenVectors:
    """An engine whose texts have their vectors already."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    async def embed(self, _: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:  # noqa: ARG002
        return Embeddings(np.stack([self._given[str(text)] for text in texts]), tokens=len(texts))

    def generate(self, *_: Any) -> AsyncGenerator[bytes]:
        raise BenchFailed("there is no language model")

    async def classify(self, *_: Any) -> Any:
        raise BenchFailed("there is no classifier")


CONFIG: Any = {"type": "vector", "embedding_model": MODEL, "chunk_size_in_tokens": CHUNK_TOKENS}


@dataclass(frozen=True)
class Here:
    """The behaviours of the stack in this process, with the writer."""

    context: Context
    memory: Memory
    writer: BankWriter

    async def bank(self) -> MemoryBank:
        """A new vector bank."""
        made = await banks.create(self.context, CreateMemoryBankRequest(name="bench", config=CONFIG))
        bank = self.context.store.memory_banks.get(self.context.tenant, made.bank_id)
        assert bank is not None
        return bank


@contextmanager
def opened_home(folder: Path, given: dict[str, Any]) -> Iterator[Here]:
    """A stack in a folder."""
    embedding = model().model_copy(update={"path": str(home() / bench_vectors.MODEL)})
    args = {
        "store": f"sqlite:///{folder / 'stack.db'}",
        "artifacts": str(folder / "artifacts"),
        "memory_banks": {"folder": str(folder / "memory_banks")},
        "models": [local_model(id="none").model_dump(mode="json", exclude_unset=True)],
        "embedding_models": [embedding.model_dump(mode="json", exclude_unset=True)],
    }
    config = Config.parse(args, "the bench's config")
    context = Context.open(config, engine=GivenVectors(given))
    writer = BankWriter(config, context.store)
    try:
        yield Here(context, Memory.open(config, writer), writer)
    finally:
        context.close()


async def fill(here: Here, bank: MemoryBank, texts: list[str], vectors: Vectors) -> None:
    """Writes texts as chunks, so many a document, whose id is its number; then the indexes are built."""
    starts = range(0, len(texts), CHUNKS_A_DOCUMENT)
    documents = []
    for number, start in enumerate(starts):
        part = slice(start, start + CHUNKS_A_DOCUMENT)
        cut = tuple(Chunk(text, place, 0, len(text), 1, None, ()) for place, text in enumerate(texts[part]))
        documents.append(_document(str(number), cut, vectors[part]))
    for first in range(0, len(documents), DOCUMENTS_A_WRITE):
        await here.writer.write(bank, documents[first : first + DOCUMENTS_A_WRITE], replace=False)
    await here.writer.look_after()
    await here.writer.until_built()


async def fill_banks(folder: Path) -> None:
    """Makes the banks of a home folder, each with a document, of which nothing is due."""
    vectors = np.eye(2, 384, dtype=np.float32)
    cut = tuple(Chunk(text, place, 0, len(text), 1, None, ()) for place, text in enumerate(("One.", "Two.")))
    with opened_home(folder, {}) as here:
        for _ in range(BANKS):
            await here.writer.write(await here.bank(), [_document("a", cut, vectors)], replace=False)
        while await here.writer.look_after():
            pass


def _document(id: str, cut: tuple[Chunk, ...], vectors: Vectors) -> Document:
    content = json.dumps("\n\n".join(chunk.text for chunk in cut))
    return Document(id, content, "text/plain", {}, id, None, cut, vectors)


if __name__ == "__main__":
    sys.exit(main())
