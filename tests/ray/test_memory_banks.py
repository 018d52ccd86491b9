"""Memory banks on the real models."""

from typing import Any

import httpx

from tests.running_stack import MODEL

CURIE = "Marie Curie was born in Warsaw. She worked with Pierre Curie at the University of Paris."
RIVER = "The Danube flows through Vienna and Budapest."


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    reply = client.post(path, json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_graph_bank_finds_documents_by_the_entities_that_the_model_has_read_in_them(client: httpx.Client) -> None:
    config = {"type": "graph", "model": MODEL, "chunk_size_in_tokens": 64}
    bank_id = post(client, "/memory_banks/create", name="people", config=config)["bank_id"]
    documents = [
        {"document_id": name, "content": text, "mime_type": "text/plain", "metadata": {}}
        for name, text in (("curie", CURIE), ("river", RIVER))
    ]
    post(client, "/memory_bank/insert", bank_id=bank_id, documents=documents)

    def found(query: str) -> set[str]:
        answer = post(client, "/memory_bank/query", bank_id=bank_id, query=query)
        assert sorted(answer["scores"], reverse=True) == answer["scores"]
        return {chunk["document_id"] for chunk in answer["chunks"]}

    # Whatever names the model has copied are in the texts: the text of a document finds it, and not the other one.
    assert found(CURIE) == {"curie"}
    assert found(RIVER) == {"river"}
    assert found("Nothing here is named") == set()
    post(client, "/memory_bank/documents/delete", bank_id=bank_id, document_ids=["curie"])
    assert found(CURIE) == set()
    assert post(client, "/memory_banks/drop", bank_id=bank_id) == bank_id
