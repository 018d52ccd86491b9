"""The rows of banks as queries go by them: read a moment ago, and gone with a drop."""

from dataclasses import replace

import pytest

from stack.store import MemoryBank, Store, memory_banks, now

BANK = MemoryBank(
    "bank-1", "acme", "notes", None, {"type": "keyword"}, None, bytes=0, created_at=now(), written_at=now()
)


def test_a_row_counts_for_a_moment_after_it_was_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.memory_banks.add(BANK)
    monkeypatch.setattr(memory_banks, "RECENT_S", 3_600)
    assert store.memory_banks.recent("acme", BANK.id) is None
    assert store.memory_banks.get("acme", BANK.id) == store.memory_banks.recent("acme", BANK.id) == BANK
    assert store.memory_banks.recent("other", BANK.id) is None
    monkeypatch.setattr(memory_banks, "RECENT_S", 0)
    assert store.memory_banks.recent("acme", BANK.id) is None


def test_a_drop_is_seen_at_once_by_who_does_it(store: Store) -> None:
    store.memory_banks.add(BANK)
    store.memory_banks.get("acme", BANK.id)
    assert store.memory_banks.delete("acme", BANK.id)
    assert store.memory_banks.recent("acme", BANK.id) is None
    assert store.memory_banks.get("acme", BANK.id) is None


def test_few_rows_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_banks, "MAX_RECENT", 1)
    monkeypatch.setattr(memory_banks, "RECENT_S", 3_600)
    store.memory_banks.add(BANK)
    other = replace(BANK, id="bank-2")
    store.memory_banks.add(other)
    store.memory_banks.get("acme", BANK.id)
    store.memory_banks.get("acme", other.id)
    assert store.memory_banks.recent("acme", BANK.id) is None
    assert store.memory_banks.recent("acme", other.id) == other


def test_a_bank_without_documents_is_asked_for_each_time(store: Store) -> None:
    store.memory_banks.add(replace(BANK, written_at=None))
    store.memory_banks.get("acme", BANK.id)
    assert store.memory_banks.recent("acme", BANK.id) is None
