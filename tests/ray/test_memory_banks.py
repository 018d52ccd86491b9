"""Memory banks on the real models."""

import asyncio
import base64
import json
from typing import Any

import fsspec
import httpx
import pytest
from lancedb.expr import col, lit
from llama_stack import LlamaStack

from stack.memory_banks.table import BankTable
from stack.memory_banks.tables import storage_options
from tests import samples
from tests.bank_clients import Clients
from tests.memory import document, pdf
from tests.running_stack import MODEL, Stack, ended, wait_for

pytestmark = pytest.mark.alone

VECTOR = {"type": "vector", "embedding_model": "all-MiniLM-L6-v2", "chunk_size_in_tokens": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "vector": VECTOR,
    "keyword": {"type": "keyword"},
    "keyvalue": {"type": "keyvalue"},
}
WRITER = "ServeReplica:gateway:MemoryWriter"
CURIE = "Marie Curie was born in Warsaw. She worked with Pierre Curie at the University of Paris."
RIVER = "The Danube flows through Vienna and Budapest."
DOCTOR = "The physician prescribed medication against fever."
BOURSE = "Share prices fell sharply on Friday, led by banks."
GARDEN = "Tulips and roses bloom behind our house in spring."
TABLE = "| City | River |\n| --- | --- |\n| Vienna | Danube |\n| Cologne | Rhine |"


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    reply = client.post(path, json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()


def create(client: httpx.Client, **config: Any) -> str:
    bank_id: str = post(client, "/memory_banks/create", name="a bank", config=config)["bank_id"]
    return bank_id


def insert(client: httpx.Client, bank_id: str, *documents: Any, **more: Any) -> None:
    assert post(client, "/memory_bank/insert", bank_id=bank_id, documents=list(documents), **more) is None


def found(client: httpx.Client, bank_id: str, query: str, **params: Any) -> list[dict[str, Any]]:
    answer = post(client, "/memory_bank/query", bank_id=bank_id, query=query, params=params)
    assert sorted(answer["scores"], reverse=True) == answer["scores"]
    return [chunk | {"score": score} for chunk, score in zip(answer["chunks"], answer["scores"], strict=True)]


def rows_in(stack: Stack, bank_id: str, document_id: str) -> int:
    """How many rows the files of a bank have of a document."""

    async def count() -> int:
        table = await BankTable.open(f"{stack.place('memory_banks')}/default/{bank_id}", storage_options())
        return len((await table.rows.query().where(col("document_id") == lit(document_id)).to_arrow()).to_pylist())

    return asyncio.run(count())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rfcs_client_does_all_that_there_is(stack: Stack, kind: str) -> None:
    given: list[Any] = [document("doctor", DOCTOR, topic="health"), document("bourse", BOURSE)]
    with httpx.Client(base_url=stack.url, timeout=120) as http:
        rfc = LlamaStack(base_url=stack.url, http_client=http)
        made: Any = rfc.memory_banks.create(body={"name": kind, "config": CONFIGS[kind]})
        bank_id = made["bank_id"]
        rfc.memory_banks.insert(bank_id=bank_id, documents=given, ttl_seconds=3_600)
        asked = "doctor" if kind == "keyvalue" else "the medication of a physician"
        answer = rfc.memory_banks.query(bank_id=bank_id, query=[asked], params={"max_chunks": 1})
        (chunk,) = answer.chunks
        assert (chunk.document_id, chunk.content, len(answer.scores)) == ("doctor", DOCTOR, 1)
        assert chunk.token_count >= 6
        changed = given[0] | {"content": GARDEN}
        rfc.memory_banks.update(bank_id=bank_id, documents=[changed])
        assert rfc.memory_banks.documents.retrieve(bank_id=bank_id, document_ids=["doctor"]).content == GARDEN
        asked = "doctor" if kind == "keyvalue" else "roses"
        assert rfc.memory_banks.query(bank_id=bank_id, query=asked).chunks[0].content == GARDEN
        several: Any = rfc.memory_banks.documents.retrieve(bank_id=bank_id, document_ids=["bourse", "doctor"])
        assert [json.loads(line) for line in several.splitlines()] == [given[1], changed]
        listed: Any = rfc.memory_banks.list()
        assert made in [json.loads(line) for line in listed.splitlines()]
        assert rfc.memory_banks.retrieve(bank_id=bank_id) == made
        rfc.memory_banks.documents.delete(bank_id=bank_id, document_ids=["doctor", "bourse"])
        assert rfc.memory_banks.query(bank_id=bank_id, query=asked).chunks == []
        assert bank_id in rfc.memory_banks.drop(bank_id=bank_id)
        assert bank_id not in str(rfc.memory_banks.list())
    files, folder = fsspec.url_to_fs(f"{stack.place('memory_banks')}/default/{bank_id}", skip_instance_cache=True)
    assert not files.exists(folder)


def test_a_vector_bank_finds_by_meaning_what_shares_no_word_with_the_query(client: httpx.Client) -> None:
    bank_id = create(client, **VECTOR)
    insert(client, bank_id, document("doctor", DOCTOR), document("bourse", BOURSE), document("garden", GARDEN))
    for query, expected in (
        ("Which drug helps a sick patient?", "doctor"),
        ("Did stocks crash?", "bourse"),
        ("flowers", "garden"),
    ):
        by_meaning = found(client, bank_id, query, mode="vector")
        assert by_meaning[0]["document_id"] == expected
        assert 1 >= by_meaning[0]["score"] > by_meaning[1]["score"] >= -1
        assert found(client, bank_id, query, mode="keyword") == []
        assert found(client, bank_id, query)[0]["document_id"] == expected


def test_a_vector_bank_is_asked_by_meaning_and_by_words_where_nothing_else_is_said(client: httpx.Client) -> None:
    bank_id = create(client, **VECTOR)
    insert(client, bank_id, document("doctor", DOCTOR), document("bourse", BOURSE), document("garden", GARDEN))
    query = "The banks of a stock market"
    asked = found(client, bank_id, query)
    assert asked == found(client, bank_id, query, mode="hybrid")
    # The first of both lists: of each it has the 1 / (60 + 1) of reciprocal rank fusion.
    assert (asked[0]["document_id"], asked[0]["score"]) == ("bourse", pytest.approx(2 / 61))


def test_a_keyword_bank_finds_other_forms_of_a_word_and_no_other_words(client: httpx.Client) -> None:
    english, german = create(client, type="keyword"), create(client, type="keyword", language="German")
    insert(client, english, document("garden", GARDEN), document("bourse", BOURSE))
    insert(client, german, document("haus", "Die Häuser stehen am Fluss."), document("baum", "Ein Baum im Wald."))
    assert [chunk["document_id"] for chunk in found(client, english, "blooming rose")] == ["garden"]
    assert found(client, english, "flowers") == []
    assert [chunk["document_id"] for chunk in found(client, german, "Flüsse")] == ["haus"]


def test_documents_are_read_as_what_they_are(stack: Stack, client: httpx.Client) -> None:
    bank_id = create(client, **VECTOR)
    pages = pdf(
        *("\n".join([line] * 8) for line in ("Bees live in hives.", "Ants live in hills.", "Wolves live in packs."))
    )
    address = f"data:application/pdf;base64,{base64.b64encode(pages).decode()}"
    html = f"<html><head><script>alert('no')</script></head><body><h1>Weather</h1><p>{RIVER}</p></body></html>"
    sent = post_file(client, "cities.md", f"# Cities\n\n{'They lie at rivers. ' * 10}\n\n## Where\n\n{TABLE}\n")
    notes = stack.home / "data" / "notes.txt"
    notes.write_text(GARDEN)
    # Of the folders of object storage no document is read, only data sets are.
    kept = post_file(client, "notes.txt", GARDEN) if stack.storage else notes.as_uri()
    insert(
        client, bank_id,
        document("animals", {"uri": address}, "application/pdf"),
        document("danube", html, "text/html"),
        document("cities", {"uri": sent}, "text/markdown"),
        document("notes", kept),
    )  # fmt: skip
    for animal, page in (("bee", 1), ("ant", 2), ("wolves", 3)):
        animals = found(client, bank_id, animal, mode="keyword")
        assert {(chunk["document_id"], chunk["page"]) for chunk in animals} == {("animals", page)}
    (river,) = found(client, bank_id, "Budapest", mode="keyword")
    assert (river["document_id"], river["headings"], "page" in river) == ("danube", ["Weather"], False)
    assert "alert" not in river["content"]
    (table,) = found(client, bank_id, "Cologne", mode="keyword")
    assert (table["document_id"], table["headings"]) == ("cities", ["Cities", "Where"])
    assert TABLE in table["content"]
    assert found(client, bank_id, "tulip", mode="keyword")[0]["document_id"] == "notes"


def post_file(client: httpx.Client, name: str, content: str) -> str:
    address: str = client.post("/datasets/upload", files={"file": (name, content.encode())}).json()["content_url"]
    return address


def test_what_was_inserted_survives_the_writer_and_the_next_one_goes_on(stack: Stack, client: httpx.Client) -> None:
    bank_id = create(client, **VECTOR)
    insert(client, bank_id, document("garden", GARDEN))
    stack.kill_9(WRITER)
    assert found(client, bank_id, "flowers")[0]["document_id"] == "garden", "nobody needs the writer to read"
    body = {"bank_id": bank_id, "documents": [document("doctor", DOCTOR)]}

    def inserted() -> bool:
        reply = client.post("/memory_bank/insert", json=body)
        assert reply.status_code in (200, 503), reply.text
        assert reply.status_code == 200 or int(reply.headers["retry-after"]) > 0
        return reply.status_code == 200

    wait_for(inserted, 60)
    assert found(client, bank_id, "drugs")[0]["document_id"] == "doctor"
    assert found(client, bank_id, "flowers")[0]["document_id"] == "garden"


def test_clients_that_write_and_ask_at_once_lose_nothing_while_the_writer_is_killed(stack: Stack) -> None:
    clients = Clients(stack, 4)
    with clients.running():
        clients.go_on(20, 60)
        stack.kill_9(WRITER)
        clients.go_on(40, 60)
    clients.check()


def test_documents_expire_and_are_swept_from_the_files(stack: Stack, client: httpx.Client) -> None:
    bank_id = create(client, **VECTOR)
    insert(client, bank_id, document("stays", GARDEN))
    insert(client, bank_id, document("goes", DOCTOR), ttl_seconds=3)
    assert found(client, bank_id, "drugs")[0]["document_id"] == "goes"
    wait_for(lambda: len(found(client, bank_id, "drugs")) == 1, 30)
    reply = client.post("/memory_bank/documents/get", params={"bank_id": bank_id}, json={"document_ids": ["goes"]})
    assert reply.status_code == 404
    wait_for(lambda: rows_in(stack, bank_id, "goes") == 0, 30)
    assert rows_in(stack, bank_id, "stays") == 2
    insert(client, bank_id, document("goes", BOURSE))  # the id is free again


def test_a_data_set_becomes_documents_by_a_job(stack: Stack, client: httpx.Client) -> None:
    count = 2_000
    rows = [{"document_id": f"n{number}", "content": f"Room {number} is painted blue."} for number in range(1, count)]
    rows.append({"document_id": "empty", "content": ""})
    file = samples.write_rows(stack.home / "data" / "rooms.jsonl", rows)
    data = samples.dataset(stack.data_at(file), document_id="text", content="text")
    bank_id = create(client, **VECTOR)
    metrics = ingested(client, samples.ingestion(data, job_uuid="ingest-rooms", bank_id=bank_id))
    counted = {name: metrics[name] for name in ("documents", "written", "unchanged", "failed", "chunks")}
    assert counted == {"documents": count, "written": count - 1, "unchanged": 0, "failed": 1, "chunks": count - 1}
    artifacts = client.get("/memory_banks/ingest/job/artifacts", params={"job_uuid": "ingest-rooms"}).json()
    assert sorted(file["name"] for file in artifacts["files"]) == ["errors.jsonl", "summary.json"]
    assert found(client, bank_id, "Room 1234 is painted blue.")[0]["document_id"] == "n1234"


def test_the_documents_of_a_bank_are_embedded_anew_for_another_one(client: httpx.Client) -> None:
    """As one would after a change of the embedding model."""
    bank_id, other = create(client, **VECTOR), create(client, **(VECTOR | {"chunk_size_in_tokens": 32}))
    insert(client, bank_id, document("doctor", DOCTOR, topic="health"), document("garden", f"<p>{GARDEN}", "text/html"))
    metrics = ingested(client, {"job_uuid": "ingest-again", "bank_id": other, "source_bank_id": bank_id})
    assert (metrics["documents"], metrics["written"]) == (2, 2)
    for query in ("Which drug helps a sick patient?", "flowers"):
        assert found(client, other, query) == found(client, bank_id, query)


def ingested(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """The metrics of an ingestion that is completed. How far it was could be asked meanwhile."""
    assert post(client, "/memory_banks/ingest", **body) == {"job_uuid": body["job_uuid"]}

    def progress() -> Any:
        status = client.get("/memory_banks/ingest/job/status", params={"job_uuid": body["job_uuid"]}).json()
        return status if (status.get("progress") or {}).get("done") else status["status"] in ("completed", "failed")

    wait_for(progress, 120)
    status = ended(client, "memory_banks/ingest", body["job_uuid"])
    assert status["status"] == "completed", status
    assert status["progress"]["done"] == status["progress"]["total"] == status["metrics"]["documents"]
    metrics: dict[str, Any] = status["metrics"]
    return metrics


def test_questions_are_asked_about_the_documents_of_a_bank(client: httpx.Client) -> None:
    bank_id = create(client, type="keyvalue")
    insert(client, bank_id, document("danube", RIVER), document("curie", f"<p>{CURIE}</p>", "text/html"))
    body = samples.generation(
        None, job_uuid="ask-bank", model=MODEL, source="documents", bank_id=bank_id, filtering_function="none",
        num_generations=2, sampling_params={"strategy": "top_p", "temperature": 0.7, "max_tokens": 100},
    )  # fmt: skip
    del body["dataset"]
    assert client.post("/synthetic_data_generation/jobs", json=body).status_code == 200
    status = ended(client, "synthetic_data_generation", "ask-bank")
    assert status["status"] == "completed", status
    metrics = status["metrics"]
    assert (metrics["prompts"], metrics["failed"]) == (2, 0)
    rejected = sum(value for name, value in metrics.items() if name.startswith("rejected_"))
    assert metrics["rows"] + rejected == 4, "each of the four is a row, or is rejected"


def test_what_cannot_be_is_refused_with_what_can(client: httpx.Client) -> None:
    reply = client.post("/memory_bank/query", json={"bank_id": "facts", "query": "a"})
    assert (reply.status_code, "'bank-'" in reply.json()["error"]["message"]) == (404, True)
    bank_id = create(client, **VECTOR)
    many = [document(str(number)) for number in range(1_001)]
    reply = client.post("/memory_bank/insert", json={"bank_id": bank_id, "documents": many})
    assert (reply.status_code, "/memory_banks/ingest" in reply.json()["error"]["message"]) == (413, True)
    assert found(client, bank_id, "text") == []


def test_a_graph_bank_finds_documents_by_the_entities_that_the_model_has_read_in_them(client: httpx.Client) -> None:
    config = {"type": "graph", "model": MODEL, "chunk_size_in_tokens": 64}
    bank_id = create(client, **config)
    insert(client, bank_id, document("curie", CURIE), document("river", RIVER))

    def about(query: str) -> set[str]:
        return {chunk["document_id"] for chunk in found(client, bank_id, query)}

    # Whatever names the model has copied are in the texts: the text of a document finds it, and not the other one.
    assert about(CURIE) == {"curie"}
    assert about(RIVER) == {"river"}
    assert about("Nothing here is named") == set()
    post(client, "/memory_bank/documents/delete", bank_id=bank_id, document_ids=["curie"])
    assert about(CURIE) == set()
    assert post(client, "/memory_banks/drop", bank_id=bank_id) == bank_id
