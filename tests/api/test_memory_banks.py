"""The memory API by HTTP: banks of each kind, what is written into them, and what is found."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from llama_stack import LlamaStack

from stack.api.memory_banks import MAX_DOCUMENTS
from stack.config import Config
from stack.context import Context
from stack.errors import Unavailable
from stack.memory_banks import banks
from stack.memory_banks import documents as preparing
from stack.memory_banks.table import BankTable
from tests.api.conftest import HERE, URL
from tests.api.envelope import error_of
from tests.conftest import CONFIG
from tests.memory import EMBEDDER, VECTOR, document, write_embedder, write_tokenizer
from tests.scripted_engine import DIMENSIONS, ScriptedEngine

CONFIGS: dict[str, dict[str, Any]] = {
    "vector": VECTOR,
    "keyvalue": {"type": "keyvalue"},
    "keyword": {"type": "keyword"},
    "graph": {"type": "graph", "chunk_size_in_tokens": 10},
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)
FRUIT = "Ripe apples are red and sweet"
STONE = "Granite mountains stand for ages"
# What the model says of each chunk; of this, what stands in it counts.
ENTITIES = {
    "entities": [{"name": name, "type": "thing"} for name in ("apples", "red", "Granite", "ages")],
    "relations": [
        {"source": "apples", "relation": "are", "target": "red"},
        {"source": "Granite", "relation": "stands for", "target": "ages"},
    ],
}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine((json.dumps(ENTITIES),))


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    write_embedder(home)
    write_tokenizer(home / "models" / "small")
    models = [{"id": "small", "path": "models/small", "context": 1_024}]
    config = CONFIG | {"store": store_url, "models": models, "embedding_models": [EMBEDDER]}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


def create(client: TestClient, kind: str = "keyvalue", **more: Any) -> str:
    reply = client.post("/memory_banks/create", json={"name": kind, "config": CONFIGS[kind] | more})
    assert reply.status_code == 200, reply.text
    bank_id: str = reply.json()["bank_id"]
    return bank_id


def insert(client: TestClient, bank_id: str, *documents: Any, **more: Any) -> Any:
    return client.post("/memory_bank/insert", json={"bank_id": bank_id, "documents": list(documents)} | more)


def inserted(client: TestClient, bank_id: str, *documents: Any, **more: Any) -> None:
    reply = insert(client, bank_id, *documents, **more)
    assert (reply.status_code, reply.text) == (200, "null")


def update(client: TestClient, bank_id: str, *documents: Any) -> Any:
    return client.post("/memory_bank/update", json={"bank_id": bank_id, "documents": list(documents)})


def delete(client: TestClient, bank_id: str, *document_ids: str) -> Any:
    body = {"bank_id": bank_id, "document_ids": list(document_ids)}
    return client.post("/memory_bank/documents/delete", json=body)


def documents(client: TestClient, bank_id: str, *document_ids: str) -> list[Any]:
    body = {"document_ids": list(document_ids)}
    reply = client.post("/memory_bank/documents/get", params={"bank_id": bank_id}, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/jsonl"
    return [json.loads(line) for line in reply.text.splitlines()]


def query(client: TestClient, bank_id: str, text: Any, **params: Any) -> Any:
    return client.post("/memory_bank/query", json={"bank_id": bank_id, "query": text, "params": params})


def found(client: TestClient, bank_id: str, text: Any, **params: Any) -> list[Any]:
    reply = query(client, bank_id, text, **params)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert len(answer["scores"]) == len(answer["chunks"])
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    chunks: list[Any] = answer["chunks"]
    return chunks


def reading(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents are read with their contents from now on, each time that some are."""
    sizes: list[int] = []
    read = BankTable.documents

    async def noted(table: BankTable, ids: Any) -> Any:
        sizes.append(len(ids))
        return await read(table, ids)

    monkeypatch.setattr(BankTable, "documents", noted)
    return sizes


def asking_for(kind: str, document_id: str, text: str) -> str:
    """What finds a document in a bank of a kind."""
    return document_id if kind == "keyvalue" else text


# Banks


def test_a_bank_has_an_id_and_is_found_by_it(client: TestClient) -> None:
    reply = client.post("/memory_banks/create", json={"name": "facts", "config": VECTOR, "url": "https://example.com"})
    bank = reply.json()
    assert bank["bank_id"].startswith("bank-")
    assert (bank["name"], bank["config"], bank["url"]) == ("facts", VECTOR, "https://example.com")
    assert client.get("/memory_banks/get", params={"bank_id": bank["bank_id"]}).json() == bank


def test_a_bank_may_be_described_within_request(client: TestClient) -> None:
    body = {"request": {"name": "facts", "config": {"type": "keyvalue"}}}
    assert client.post("/memory_banks/create", json=body).status_code == 200


def test_banks_of_one_name_are_two(client: TestClient) -> None:
    assert create(client) != create(client)


def test_banks_are_listed_a_line_each(client: TestClient) -> None:
    ids = [create(client, kind) for kind in CONFIGS]
    reply = client.get("/memory_banks/list")
    assert reply.headers["content-type"] == "application/jsonl"
    assert [json.loads(line)["bank_id"] for line in reply.text.splitlines()] == ids[::-1]
    page = client.get("/memory_banks/list", params={"after": ids[2], "limit": 1})
    assert json.loads(page.text)["bank_id"] == ids[1]


def test_the_openapi_document_says_what_a_line_is(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    listed = paths["/memory_banks/list"]["get"]["responses"]["200"]["content"]
    assert listed == {"application/jsonl": {"schema": {"$ref": "#/components/schemas/MemoryBank"}}}


def test_a_new_bank_takes_no_room_and_no_model_but_its_own(client: TestClient, home: Path) -> None:
    for kind in CONFIGS:
        create(client, kind)
    assert not (home / "memory_banks").exists()


@every_kind
def test_a_dropped_bank_is_gone_with_its_files(client: TestClient, home: Path, kind: str) -> None:
    bank_id = create(client, kind)
    inserted(client, bank_id, document("a"))
    assert any(bank_id in str(path) for path in (home / "memory_banks").rglob("*"))
    reply = client.post("/memory_banks/drop", json={"bank_id": bank_id})
    assert (reply.status_code, reply.json()) == (200, bank_id)
    assert not any(bank_id in str(path) for path in (home / "memory_banks").rglob("*"))
    error_of(client.get("/memory_banks/get", params={"bank_id": bank_id}), 404)
    error_of(query(client, bank_id, "a"), 404)
    error_of(insert(client, bank_id, document("a")), 404)
    assert client.get("/memory_banks/list").text == ""


def test_a_bank_is_dropped_where_its_files_cannot_be_removed_now(
    client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(bank: Any) -> None:
        raise Unavailable("the writer of the memory banks does not answer now")

    bank_id = create(client, "keyvalue")
    monkeypatch.setattr(app.state.memory.writer, "drop", away)
    assert client.post("/memory_banks/drop", json={"bank_id": bank_id}).status_code == 200
    error_of(client.get("/memory_banks/get", params={"bank_id": bank_id}), 404)


def test_a_bank_that_is_dropped_while_it_is_asked_is_404(
    client: TestClient, app: FastAPI, context: Context, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank_id = create(client, "vector")
    inserted(client, bank_id, document("a"))
    embed = engine.embed

    async def dropping(*asked: Any) -> Any:
        await banks.drop(context, app.state.memory, bank_id)
        return await embed(*asked)

    monkeypatch.setattr(engine, "embed", dropping)
    assert error_of(query(client, bank_id, "a"), 404)["param"] == "bank_id"


def test_a_name_is_no_id_and_the_error_says_so(client: TestClient) -> None:
    create(client)
    error = error_of(query(client, "keyvalue", "a"), 404)
    assert error["param"] == "bank_id"
    assert "'bank-'" in error["message"]


@pytest.mark.parametrize(
    ("config", "status", "allowed"),
    [
        (VECTOR | {"embedding_model": "none"}, 404, "embedder"),
        (VECTOR | {"embedding_model": "small"}, 400, "embedder"),
        (VECTOR | {"chunk_size_in_tokens": 21}, 400, "8 to 20"),
        (VECTOR | {"chunk_size_in_tokens": 7}, 400, "8"),
        (VECTOR | {"overlap_size_in_tokens": 6}, 400, "at most half"),
        ({"type": "table"}, 400, "'vector', 'keyvalue', 'keyword', 'graph'"),
        ({"type": "keyword", "language": "Klingon"}, 400, "English"),
        ({"type": "keyvalue", "stem": True}, 400, "type"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_with_what_can(
    client: TestClient, config: Any, status: int, allowed: str
) -> None:
    error = error_of(client.post("/memory_banks/create", json={"name": "a", "config": config}), status)
    assert error["param"].startswith("config")
    assert allowed in error["message"]


# Documents


@every_kind
def test_what_is_inserted_is_found_by_the_next_query(client: TestClient, kind: str) -> None:
    bank_id = create(client, kind)
    assert found(client, bank_id, "anything") == []
    inserted(client, bank_id, document("fruit", FRUIT, colour="red"), document("stone", STONE))
    first = found(client, bank_id, asking_for(kind, "fruit", FRUIT))[0]
    assert (first["document_id"], first["content"], first["position"]) == ("fruit", FRUIT, 0)
    assert (first["token_count"], first["metadata"], first["headings"]) == (6, {"colour": "red"}, [])


@every_kind
def test_documents_come_back_as_they_were_given(client: TestClient, kind: str) -> None:
    bank_id = create(client, kind)
    given = [
        document("b", ["in ", "parts"], nothing=None, deep={"list": [1, 2.5, None]}),
        document("a", {"uri": "data:text/plain,some%20text"}),
        document("c", "# Title\n\nA paragraph.", "text/markdown"),
    ]
    inserted(client, bank_id, *given)
    assert documents(client, bank_id, "c", "a", "b") == [given[2], given[1], given[0]]


def test_documents_that_are_not_there_are_404_and_named(client: TestClient) -> None:
    bank_id = create(client)
    inserted(client, bank_id, document("a"))
    body = {"document_ids": ["a", "b", "c"]}
    error = error_of(client.post("/memory_bank/documents/get", params={"bank_id": bank_id}, json=body), 404)
    assert (error["param"], "'b', 'c'" in error["message"]) == ("document_ids", True)


def test_many_documents_are_read_a_few_at_a_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    bank_id = create(client)
    given = [document(f"{number:02}", f"the text {number}") for number in range(2 * banks.PAGE + 1)]
    inserted(client, bank_id, *given)
    sizes = reading(monkeypatch)
    assert documents(client, bank_id, *(one["document_id"] for one in given)) == given
    assert sizes == [banks.PAGE, banks.PAGE, 1]


def test_what_is_written_is_compared_without_reading_what_is_there(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank_id = create(client)
    inserted(client, bank_id, document("a", FRUIT))
    sizes = reading(monkeypatch)
    inserted(client, bank_id, document("a", FRUIT))
    assert update(client, bank_id, document("a", STONE)).status_code == 200
    assert sizes == []


@every_kind
def test_the_same_insert_again_changes_nothing(client: TestClient, kind: str, engine: ScriptedEngine) -> None:
    bank_id = create(client, kind)
    for _ in range(3):
        inserted(client, bank_id, document("a", FRUIT, n=1), document("b", STONE))
    asked = len(engine.asked_to_embed), len(engine.asked)
    inserted(client, bank_id, document("a", FRUIT, n=1))
    assert (len(engine.asked_to_embed), len(engine.asked)) == asked
    chunks = found(client, bank_id, asking_for(kind, "a", FRUIT))
    expected = [("a", 0), ("b", 0)] if kind == "vector" else [("a", 0)]  # by meaning, all are found
    assert sorted((chunk["document_id"], chunk["position"]) for chunk in chunks) == expected


@pytest.mark.parametrize(
    "other", [document("a", STONE), document("a", FRUIT, n=2), document("a", FRUIT, "text/markdown")]
)
def test_another_document_of_a_taken_id_is_409_and_nothing_is_written(client: TestClient, other: Any) -> None:
    bank_id = create(client)
    inserted(client, bank_id, document("a", FRUIT))
    error = error_of(insert(client, bank_id, document("b"), other), 409)
    assert "/memory_bank/update" in error["message"]
    assert "'a'" in error["message"]
    assert found(client, bank_id, "b") == []


@every_kind
def test_an_update_replaces_all_that_was_made_of_a_document(client: TestClient, kind: str) -> None:
    bank_id = create(client, kind)
    inserted(client, bank_id, document("a", " ".join([FRUIT] * 5)), document("b", "else"))
    reply = update(client, bank_id, document("a", STONE, n=1))
    assert (reply.status_code, reply.text) == (200, "null")
    assert documents(client, bank_id, "a") == [document("a", STONE, n=1)]
    chunks = [chunk for chunk in found(client, bank_id, asking_for(kind, "a", STONE)) if chunk["document_id"] == "a"]
    assert [(chunk["content"], chunk["metadata"]) for chunk in chunks] == [(STONE, {"n": 1})]


def test_an_update_of_what_is_not_there_is_404_and_nothing_is_written(client: TestClient) -> None:
    bank_id = create(client)
    inserted(client, bank_id, document("a", FRUIT))
    error = error_of(update(client, bank_id, document("a", STONE), document("b")), 404)
    assert "'b'" in error["message"]
    assert documents(client, bank_id, "a") == [document("a", FRUIT)]


@every_kind
def test_deleted_documents_are_gone_and_may_be_deleted_again(client: TestClient, kind: str) -> None:
    bank_id = create(client, kind)
    inserted(client, bank_id, document("a", FRUIT), document("b", STONE))
    for _ in range(2):
        assert delete(client, bank_id, "a", "a", "nowhere").status_code == 200
    chunks = found(client, bank_id, asking_for(kind, "a", FRUIT))
    assert all(chunk["document_id"] == "b" for chunk in chunks)
    assert documents(client, bank_id, "b") == [document("b", STONE)]


def test_a_document_twice_in_one_call_is_400(client: TestClient) -> None:
    bank_id = create(client)
    error = error_of(insert(client, bank_id, document("a"), document("b"), document("a")), 400)
    assert "'a'" in error["message"]
    assert found(client, bank_id, "b") == []


@pytest.mark.parametrize("count", [MAX_DOCUMENTS + 1, 100_000])
def test_more_documents_than_a_call_takes_are_413_and_told_of_the_job(client: TestClient, count: int) -> None:
    bank_id = create(client)
    error = error_of(insert(client, bank_id, *(document(str(number), "x") for number in range(count))), 413)
    assert (error["param"], "/memory_banks/ingest" in error["message"]) == ("documents", True)
    assert str(MAX_DOCUMENTS) in error["message"]


def test_a_larger_body_than_a_call_takes_is_413_and_told_of_the_job(client: TestClient, context: Context) -> None:
    most = context.config.memory_banks.max_body_bytes
    length = {"content-length": str(most + 1)}
    error = error_of(client.post("/memory_bank/insert", content=b"{}", headers=length), 413)
    assert error["message"] == f"the body has more than {most} bytes. The job /memory_banks/ingest takes more"


def test_as_many_documents_as_a_call_takes_are_taken(client: TestClient) -> None:
    bank_id = create(client)
    inserted(client, bank_id, *(document(f"{number:04}", str(number)) for number in range(MAX_DOCUMENTS)))
    assert found(client, bank_id, "0999")[0]["content"] == "999"


@pytest.mark.parametrize(("kind", "bound"), [("vector", "MAX_CHUNKS"), ("graph", "MAX_GRAPH_CHUNKS")])
def test_more_chunks_than_a_call_takes_are_413_and_told_of_the_job(
    client: TestClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, kind: str, bound: str
) -> None:
    monkeypatch.setattr(preparing, bound, 3)
    bank_id = create(client, kind)
    inserted(client, bank_id, document("fits", " ".join(["word"] * 30)))
    asked = len(engine.asked_to_embed), len(engine.asked)
    error = error_of(insert(client, bank_id, document("a"), document("b", " ".join(["word"] * 30))), 413)
    assert (error["param"], "/memory_banks/ingest" in error["message"]) == ("documents.1", True)
    assert "there are 4 chunks; allowed at once: 3" in error["message"]
    assert (len(engine.asked_to_embed), len(engine.asked)) == asked


@pytest.mark.parametrize(
    ("content", "mime_type", "problem"),
    [
        ("", "text/plain", "a"),
        (base64.b64encode(b"\x00\x01\x02\xff" * 50).decode(), "application/zip", "application/zip"),
        ({"uri": "nonsense"}, "text/plain", "data:TYPE"),
        ({"uri": "http://127.0.0.1/a"}, "text/plain", "https"),
        ({"uri": "https://127.0.0.1/a"}, "text/plain", "public"),
        ("file:///etc/passwd", "text/plain", "data folders"),
        ({"uri": "data:text/html,a"}, "text/plain", "text/html"),
        ({"uri": "data:text/plain;base64,%%%"}, "text/plain", "base64"),
    ],
)
def test_a_document_that_cannot_be_read_is_400_and_named(
    client: TestClient, content: Any, mime_type: str, problem: str
) -> None:
    bank_id = create(client)
    error = error_of(insert(client, bank_id, document("fine"), document("bad", content, mime_type)), 400)
    assert error["param"].startswith("documents.1")
    assert problem in error["message"]
    assert found(client, bank_id, "fine") == []


def test_an_unknown_upload_is_404(client: TestClient) -> None:
    error_of(insert(client, create(client), document("a", {"uri": "upload://none/a.txt"})), 404)


def test_an_uploaded_file_becomes_a_document(client: TestClient) -> None:
    sent = client.post("/datasets/upload", files={"file": ("notes.md", b"# Fruit\n\nApples are red.")}).json()
    bank_id = create(client, "keyword")
    inserted(client, bank_id, document("notes", {"uri": sent["content_url"]}, "text/markdown"))
    (chunk,) = found(client, bank_id, "apples")
    assert "Apples are red." in chunk["content"]
    assert documents(client, bank_id, "notes")[0]["content"] == {"uri": sent["content_url"]}


def test_a_file_in_the_data_folder_becomes_a_document(client: TestClient, home: Path) -> None:
    (home / "data" / "notes.txt").write_text(FRUIT)
    bank_id = create(client)
    inserted(client, bank_id, document("notes", f"file://{home}/data/notes.txt"))
    assert found(client, bank_id, "notes")[0]["content"] == FRUIT


def test_a_full_quota_is_507_and_nothing_is_written(home: Path, app: FastAPI, context: Context) -> None:
    small = context.config.model_copy(update={"max_tenant_bytes": 1_024})
    app.state.context = Context(small, context.store, context.artifacts, context.engine)
    with TestClient(app, client=HERE, base_url=URL) as client:
        bank_id = create(client)
        assert error_of(insert(client, bank_id, document("a", "x" * 2_000)), 507)["code"] == "storage_full"
        assert found(client, bank_id, "a") == []


# Queries


def test_keys_are_exact_or_the_beginnings_of_keys(client: TestClient) -> None:
    bank_id = create(client)
    inserted(client, bank_id, *(document(key) for key in ("a/1", "a/2", "b/1", "a%", "A/1")))
    assert [chunk["document_id"] for chunk in found(client, bank_id, "a/1")] == ["a/1"]
    assert found(client, bank_id, "a/") == []
    assert sorted(chunk["document_id"] for chunk in found(client, bank_id, "a/", prefix=True)) == ["a/1", "a/2"]
    assert [chunk["document_id"] for chunk in found(client, bank_id, "a%", prefix=True)] == ["a%"]


def test_words_are_found_in_any_form_where_they_are_stemmed(client: TestClient) -> None:
    stemmed, exact = create(client, "keyword"), create(client, "keyword", stem=False)
    for bank_id in (stemmed, exact):
        inserted(client, bank_id, document("a", "mountains"), document("b", "rivers"))
    assert [chunk["document_id"] for chunk in found(client, stemmed, "mountain")] == ["a"]
    assert found(client, exact, "mountain") == []


@pytest.mark.parametrize("mode", ["vector", "keyword", "hybrid"])
def test_a_vector_bank_is_asked_in_each_mode(client: TestClient, mode: str) -> None:
    bank_id = create(client, "vector")
    inserted(client, bank_id, document("fruit", FRUIT), document("stone", STONE))
    assert found(client, bank_id, FRUIT, mode=mode)[0]["document_id"] == "fruit"
    assert found(client, bank_id, ["Ripe apples are ", "red and sweet"], mode=mode)[0]["document_id"] == "fruit"


def test_a_graph_bank_is_asked_for_entities_and_what_is_related_to_them(client: TestClient) -> None:
    bank_id = create(client, "graph")
    inserted(client, bank_id, document("fruit", FRUIT), document("other", "Some apples are green"))
    assert [chunk["document_id"] for chunk in found(client, bank_id, "-", entities=["RED"])] == ["fruit", "other"]
    assert found(client, bank_id, "-") == []
    assert found(client, bank_id, "-", entities=["Granite"], hops=3) == []


def test_params_bound_what_is_found(client: TestClient) -> None:
    bank_id = create(client, "vector")
    inserted(client, bank_id, *(document(str(number), f"word number {number}", n=number) for number in range(30)))
    assert len(found(client, bank_id, "word")) == 10
    assert len(found(client, bank_id, "word", max_chunks=25)) == 25
    assert len(found(client, bank_id, "word", max_tokens=9)) == 3
    assert [
        chunk["document_id"] for chunk in found(client, bank_id, "word number 7", mode="vector", score_threshold=0.999)
    ] == ["7"]


def test_a_long_document_is_cut_and_its_neighbours_come_along(client: TestClient) -> None:
    bank_id = create(client, "vector")
    inserted(client, bank_id, document("long", " ".join(f"word{number}" for number in range(40))))
    chunks = found(client, bank_id, "word0", max_chunks=100)
    assert len(chunks) >= 4
    assert all(chunk["token_count"] <= 10 for chunk in chunks)
    (second,) = [chunk for chunk in chunks if chunk["position"] == 1]
    around = found(client, bank_id, second["content"], max_chunks=1, neighbours=1)
    assert {chunk["position"] for chunk in around} >= {0, 1, 2}


@pytest.mark.parametrize(
    ("kind", "params", "param"),
    [
        ("keyvalue", {"mode": "vector"}, "params.mode"),
        ("keyword", {"mode": "keyword"}, "params.mode"),
        ("keyword", {"prefix": True}, "params.prefix"),
        ("vector", {"prefix": True}, "params.prefix"),
        ("graph", {"mode": "vector"}, "params.mode"),
        ("vector", {"entities": ["apples"]}, "params.entities"),
        ("keyword", {"entities": ["apples"]}, "params.entities"),
        ("keyvalue", {"hops": 1}, "params.hops"),
        ("vector", {"hops": 2}, "params.hops"),
        ("graph", {"hops": 4}, "params.hops"),
        ("graph", {"entities": ["a"] * 101}, "params.entities"),
        ("vector", {"mode": "magic"}, "params.mode"),
        ("vector", {"max_chunks": 0}, "params.max_chunks"),
        ("vector", {"max_chunks": 1_001}, "params.max_chunks"),
        ("vector", {"neighbours": 11}, "params.neighbours"),
        ("vector", {"limit": 3}, "params"),
    ],
)
def test_params_that_a_kind_does_not_take_are_400_and_named(
    client: TestClient, kind: str, params: dict[str, Any], param: str
) -> None:
    error = error_of(query(client, create(client, kind), "a", **params), 400)
    assert error["param"] == param


@pytest.mark.parametrize(("levels", "width", "allowed"), [(50, 1, 10), (2, 20, 200)])
def test_a_filter_that_is_too_deep_or_too_large_is_400(
    client: TestClient, levels: int, width: int, allowed: int
) -> None:
    asked: dict[str, Any] = {"type": "exists", "key": "a"}
    for _ in range(levels):
        asked = {"type": "and", "filters": [asked] * width}
    error = error_of(query(client, create(client), "a", filter=asked), 400)
    assert (error["param"], f"allowed: at most {allowed}" in error["message"]) == ("params.filter", True)


@pytest.mark.parametrize("text", ["", " \n", [], [""], "x" * 20_001, "a\0b", 5, None, {"a": 1}])
def test_a_query_that_is_none_is_400(client: TestClient, text: Any) -> None:
    assert error_of(query(client, create(client), text), 400)["param"].startswith("query")


def test_a_query_that_is_too_long_for_the_model_is_400(client: TestClient) -> None:
    bank_id = create(client, "vector")
    inserted(client, bank_id, document("a"))
    assert error_of(query(client, bank_id, "word " * 21), 400)["param"] == "query"


def test_a_model_of_other_dimensions_is_409_with_both_and_the_way_out(
    client: TestClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank_id = create(client, "vector")
    inserted(client, bank_id, document("a"))
    embed = engine.embed

    async def longer(*asked: Any) -> Any:
        embedded = await embed(*asked)
        return type(embedded)(np.hstack([embedded.vectors, embedded.vectors]), embedded.tokens)

    monkeypatch.setattr(engine, "embed", longer)
    for reply in (query(client, bank_id, "a"), insert(client, bank_id, document("b"))):
        error = error_of(reply, 409)
        assert error["code"] == "dimensions_changed"
        assert str(DIMENSIONS) in error["message"]
        assert str(2 * DIMENSIONS) in error["message"]
        assert "/memory_banks/ingest" in error["message"]


# The RFC's own client


def test_the_rfcs_client_works_unmodified(client: TestClient) -> None:
    def passed_on(request: httpx.Request) -> httpx.Response:
        reply = client.request(
            request.method,
            request.url.path,
            params=request.url.params,
            content=request.content,
            headers=request.headers,
        )
        return httpx.Response(reply.status_code, content=reply.content, headers=reply.headers)

    http = httpx.Client(base_url=URL, transport=httpx.MockTransport(passed_on))
    llama = LlamaStack(base_url=URL, http_client=http)
    made: Any = llama.memory_banks.create(body={"name": "facts", "config": VECTOR})
    bank_id = made["bank_id"]
    given: Any = document("fruit", FRUIT, colour="red")
    llama.memory_banks.insert(bank_id=bank_id, documents=[given, document("b", "else")], ttl_seconds=3_600)
    answer = llama.memory_banks.query(bank_id=bank_id, query=[FRUIT], params={"max_chunks": 3})
    first = answer.chunks[0]
    assert (first.document_id, first.content, first.token_count) == ("fruit", FRUIT, 6)
    assert len(answer.scores) == len(answer.chunks)
    changed: Any = given | {"content": STONE}
    llama.memory_banks.update(bank_id=bank_id, documents=[changed])
    assert llama.memory_banks.documents.retrieve(bank_id=bank_id, document_ids=["fruit"]).content == STONE
    several: Any = llama.memory_banks.documents.retrieve(bank_id=bank_id, document_ids=["fruit", "b"])
    assert [json.loads(line) for line in several.splitlines()] == [changed, document("b", "else")]
    listed: Any = llama.memory_banks.list()
    assert json.loads(listed) == llama.memory_banks.retrieve(bank_id=bank_id) == made
    llama.memory_banks.documents.delete(bank_id=bank_id, document_ids=["fruit", "b"])
    assert llama.memory_banks.query(bank_id=bank_id, query=FRUIT).chunks == []
    assert bank_id in llama.memory_banks.drop(bank_id=bank_id)
    http.close()
