"""Memory banks on storage that speaks S3: what is written is there for another process, and goes with the bank."""

import datetime as dt
import uuid
from pathlib import Path

import s3fs

from stack.config import Config
from stack.memory_banks.search import Query, search
from stack.memory_banks.tables import Tables
from stack.memory_banks.writer import BankWriter
from stack.store import MemoryBank, Store, now
from tests.conftest import CONFIG
from tests.s3 import S3
from tests.unit.memory_banks.documents import DIMENSIONS, document, vector

VECTOR = {"type": "vector", "embedding_model": "embedder", "chunk_size_in_tokens": 10}


async def test_a_bank_is_kept_on_object_storage_and_goes_from_there(s3: S3, home: Path) -> None:
    folder = s3.bucket()
    config = Config.parse(
        CONFIG | {"store": f"sqlite:///{home}/stack.db", "memory_banks": {"folder": folder}}, "the test's"
    )
    store = Store(config.store_url)
    bank = MemoryBank(f"bank-{uuid.uuid4().hex}", "acme", "a", None, VECTOR, DIMENSIONS, bytes=0, created_at=now())
    store.memory_banks.add(bank)

    writer = BankWriter(config, store)
    expired = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    documents = [document("tea", "the tea is hot"), document("old", "it was cold", expires_at=expired)]
    await writer.write(bank, documents, replace=False)
    await writer.write(bank, [document("tea", "the tea is hot. it steams")], replace=True)
    assert await writer.look_after() == 1

    row = store.memory_banks.get("acme", bank.id)
    assert row is not None
    assert row.bytes > 1_000
    opened = await Tables(config).get(row)  # as another process does
    assert opened is not None
    found = await search(opened.table, Query("hybrid", "steams", vector("it steams")))
    assert [(hit.document_id, hit.chunk.text) for hit in found] == [("tea", "it steams"), ("tea", "the tea is hot")]
    assert await opened.table.ids() == ["tea"]
    assert not (home / "memory_banks").exists()

    await writer.drop(bank)
    assert s3fs.S3FileSystem().find(folder) == []
    store.close()
