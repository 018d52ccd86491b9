"""Documents on their way into a bank: had, read, cut into chunks and embedded, so that the writer has only to write."""

import asyncio
import datetime as dt
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stack.api.memory_banks import INGEST, GraphBankConfig, MemoryBankDocument, VectorBankConfig
from stack.config import EmbeddingModel
from stack.context import Context
from stack.errors import BadInput, Conflict, StackError, TooLarge, Unavailable
from stack.memory_banks import contents
from stack.memory_banks.chunking import chunks, count_words, text_of, token_counter
from stack.memory_banks.extraction import extract
from stack.memory_banks.reading import ReadText, read
from stack.memory_banks.rows import Chunk, Document
from stack.memory_banks.tasks import all_of
from stack.store import MemoryBank

# Of one call, together; and of one document in a job.
MAX_CHUNKS = 5_000
MAX_JOB_CHUNKS = 50_000
# Of one call into a graph bank, which asks a language model about each.
MAX_GRAPH_CHUNKS = 500
# How many words a chunk of a keyword bank has, at most.
KEYWORD_CHUNK_WORDS = 200
# How many texts the embedding model is asked for at once, and how often at the same time, so that it never waits.
EMBED_TEXTS = 64
EMBED_AT_ONCE = 3
# How long the documents of a call may be read and cut, with the wait for a thread.
READ_SECONDS = 120
# Reading and cutting computes: it has few threads of its own, and leaves the other routes theirs.
_READERS = ThreadPoolExecutor(2, thread_name_prefix="bank-reader")
# Of each tenant that reads now: whose turn it is to have one of the threads.
_turns = WeakValueDictionary[str, asyncio.Lock]()

T = TypeVar("T")


def hash_of(document: MemoryBankDocument) -> str:
    """What two documents have in common that are the same as given: the SHA-256 of content, MIME type and metadata."""
    return _hash_of(contents.as_json(document), document)


def _hash_of(content: str, document: MemoryBankDocument) -> str:
    given = [content, document.mime_type, document.metadata]
    return hashlib.sha256(json.dumps(given, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


async def prepare(
    context: Context,
    bank: MemoryBank,
    documents: Sequence[MemoryBankDocument],
    expiries: Sequence[dt.datetime | None],
    in_job: bool = False,
) -> list[Document]:
    """Documents ready to be written, in their order.

    Raises what `contents` does, BadInput for a document that cannot be read, TooLarge for too many chunks in all,
    Unavailable where all is not read in time, what asking the bank's model does, for a graph bank what `extract` does,
    and Conflict where the embedding model's vectors no longer have the length of the bank's.
    """
    had = await contents.contents(context, documents)
    try:
        async with asyncio.timeout(None if in_job else READ_SECONDS):
            ready = await _all_read(context, bank, documents, had, expiries, in_job)
    except TimeoutError:
        raise Unavailable(
            f"the documents were not read within {READ_SECONDS} s; the job {INGEST} may take longer", param="documents"
        ) from None
    cut = [one.chunks for one in ready]
    if bank.config["type"] == "vector":
        vectors = await _embedded(context, bank, cut)
        return [replace(one, vectors=its) for one, its in zip(ready, vectors, strict=True)]
    if bank.config["type"] == "graph":
        config = GraphBankConfig.model_validate(bank.config)
        graphs = await extract(context, config, [one.document_id for one in ready], cut)
        return [replace(one, graph=its) for one, its in zip(ready, graphs, strict=True)]
    return ready


async def text_in(context: Context, document: MemoryBankDocument) -> str:
    """A document's text as it is read, in which its chunks have their places. Raises as `prepare` does."""
    (content,) = await contents.contents(context, [document])
    reading = partial(read, content, document.mime_type, contents.name_of(document))
    return text_of(await _in_thread(reading))


async def embed_query(context: Context, bank: MemoryBank, text: str) -> NDArray[np.float32]:
    """The vector of a query. Raises BadInput where it is too long for the model, and Conflict as `prepare` does."""
    try:
        vectors = await embed(context, bank, [text])
    except BadInput as error:
        raise BadInput(error.message, param="query", code=error.code) from error
    vector: NDArray[np.float32] = vectors[0]
    return vector


async def embed(context: Context, bank: MemoryBank, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors of texts by a bank's model. Raises Conflict where they have another length than the bank's."""
    model = bank.config["embedding_model"]
    vectors = (await context.models.embed(model, texts)).vectors
    if vectors.shape[1] != bank.dimensions:
        raise Conflict(
            f"the memory bank {bank.id!r} holds vectors of {bank.dimensions} dimensions, and its embedding model "
            f"{model!r} makes such of {vectors.shape[1]} now: make another bank by /memory_banks/create, and fill it "
            f"by the job {INGEST} with this bank as its source",
            param="bank_id",
            code="dimensions_changed",
        )
    return vectors


def require_chunk_size(model: EmbeddingModel, config: VectorBankConfig) -> None:
    """Raises BadInput for chunks that are longer than what an embedding model takes."""
    most = longest_chunk(model)
    if config.chunk_size_in_tokens > most:
        raise BadInput(
            f"chunk_size_in_tokens is {config.chunk_size_in_tokens}; allowed: 8 to {most}, as the embedding model "
            f"{model.id!r} takes no more",
            param="config.chunk_size_in_tokens",
        )


def longest_chunk(model: EmbeddingModel) -> int:
    """How many tokens a chunk can have that an embedding model takes. It reads the model's files."""
    token_counter(model.folder)
    special = Tokenizer.from_file(str(model.folder / "tokenizer.json")).num_special_tokens_to_add(is_pair=False)
    return _max_tokens(model.folder) - special


def _max_tokens(folder: Path) -> int:
    """How many tokens a model takes, special ones among them, as sentence-transformers finds it."""
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
        ("config.json", "max_position_embeddings"),
    ):
        if (file := folder / name).is_file() and (found := json.loads(file.read_text()).get(key)):
            return int(found)
    raise BadInput(f"the embedding model in {folder} does not say how many tokens it takes")


async def _all_read(
    context: Context,
    bank: MemoryBank,
    documents: Sequence[MemoryBankDocument],
    had: Sequence[bytes],
    expiries: Sequence[dt.datetime | None],
    in_job: bool,
) -> list[Document]:
    """Documents read and cut, one after another."""
    most = MAX_JOB_CHUNKS if in_job else MAX_GRAPH_CHUNKS if bank.config["type"] == "graph" else MAX_CHUNKS
    ready, total = list[Document](), 0
    for number, one in enumerate(zip(documents, had, expiries, strict=True)):
        reading = partial(_read, context, bank, *one)
        try:
            ready.append(await (_in_thread(reading) if in_job else _in_turn(context.tenant, reading)))
        except StackError as error:
            error.param = f"documents.{number}"
            raise
        total += len(ready[-1].chunks)
        if total > most:
            hint = "" if in_job else f". The job {INGEST} takes more"
            raise TooLarge(f"there are {total} chunks; allowed at once: {most}{hint}", param=f"documents.{number}")
    return ready


async def _in_turn(tenant: str, read: Callable[[], T]) -> T:
    """What is read in a thread when none of the tenant's is taken: others never wait behind all that it has sent."""
    turn = _turns.setdefault(tenant, asyncio.Lock())
    await turn.acquire()
    reading = _in_thread(read)
    reading.add_done_callback(lambda _: turn.release())
    return await asyncio.shield(reading)  # who leaves does not end what the thread does


def _in_thread(read: Callable[[], T]) -> asyncio.Future[T]:
    return asyncio.get_running_loop().run_in_executor(_READERS, read)


def _read(
    context: Context, bank: MemoryBank, document: MemoryBankDocument, content: bytes, expires_at: dt.datetime | None
) -> Document:
    """A document without what is made by models."""
    cut = _cut(context, bank, document, content)
    given = contents.as_json(document)
    return Document(
        document.document_id, given, document.mime_type, document.metadata, _hash_of(given, document),
        expires_at, cut, vectors=None,
    )  # fmt: skip


def _cut(context: Context, bank: MemoryBank, document: MemoryBankDocument, content: bytes) -> tuple[Chunk, ...]:
    text = read(content, document.mime_type, contents.name_of(document))
    match bank.config["type"]:
        case "vector":
            config = VectorBankConfig.model_validate(bank.config)
            model = context.models.get_embedding_model(config.embedding_model)
            return chunks(text, config.chunk_size_in_tokens, config.overlap, token_counter(model.folder))
        case "keyword":
            return chunks(text, KEYWORD_CHUNK_WORDS, 0, count_words)
        case "graph":
            graph = GraphBankConfig.model_validate(bank.config)
            assert graph.model is not None
            folder = context.models.get(graph.model).base.folder
            return chunks(text, graph.chunk_size_in_tokens, graph.overlap, token_counter(folder))
        case _:
            return (_whole(text),)


def _whole(text: ReadText) -> Chunk:
    """A document as one chunk."""
    whole = text_of(text)
    return Chunk(whole, 0, 0, len(whole), count_words([whole])[0], None, ())


async def _embedded(context: Context, bank: MemoryBank, cut: Sequence[tuple[Chunk, ...]]) -> list[NDArray[np.float32]]:
    """The vectors of the chunks of documents, for each document (chunks, dimensions)."""
    texts = [chunk.text for of_document in cut for chunk in of_document]
    slots = asyncio.Semaphore(EMBED_AT_ONCE)

    async def some(batch: Sequence[str]) -> NDArray[np.float32]:
        async with slots:
            return await embed(context, bank, batch)

    parts = await all_of(some(texts[n : n + EMBED_TEXTS]) for n in range(0, len(texts), EMBED_TEXTS))
    vectors = np.concatenate(parts) if parts else np.empty((0, bank.dimensions or 0))
    ends = np.cumsum([len(of_document) for of_document in cut])
    return [part.astype(np.float32, copy=False) for part in np.split(vectors, ends[:-1])]
