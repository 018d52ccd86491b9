"""What tests of memory banks share: an embedding model's tokenizer, requests, and PDFs."""

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.scripted_engine import MAX_WORDS

EMBEDDER = {"id": "embedder", "path": "models/embedder"}
VECTOR = {"type": "vector", "embedding_model": "embedder", "chunk_size_in_tokens": 10}


def write_embedder(home: Path) -> None:
    """The files of the scripted engine's embedding model: a word is a token."""
    folder = home / "models" / "embedder"
    write_tokenizer(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_WORDS}))


def write_tokenizer(folder: Path) -> None:
    """Of a model in whose words a word is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def document(document_id: str, content: Any = "a text", mime_type: str = "text/plain", **metadata: Any) -> Any:
    return {"document_id": document_id, "content": content, "mime_type": mime_type, "metadata": metadata}


def pdf(*texts: str) -> bytes:
    """A PDF with a page for each text."""
    file = io.BytesIO()
    with PdfPages(file) as pages:
        for text in texts:
            figure = Figure()
            figure.text(0.1, 0.5, text)
            pages.savefig(figure)
    return file.getvalue()
