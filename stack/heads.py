"""Small heads: a linear layer on the vectors of an embedding model, which makes a sequence classifier of it.

Its folder holds `head.json`, which is a Head, and `head.safetensors` with `weight` (labels, dimensions) and `bias`
(labels), both in float32: a few kilobytes, where a classifier of its own has as many weights as its encoder.
"""

import hashlib
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from stack.api.wire import Wire, at_most, describe
from stack.errors import BadInput

HEAD = "head.json"
WEIGHTS = "head.safetensors"
# Of an embedding model's folder.
ENCODER_WEIGHTS = "model.safetensors"
Array = NDArray[np.float32]
Name = Annotated[str, Field(min_length=1, max_length=300)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Head(Wire):
    """What a head is, and where it comes from.

    `encoder` is the folder of the embedding model, as a `path` in the config, whose weights have `encoder_sha256`. The
    logits are in the order of `labels`. It was trained on texts of up to `max_tokens` tokens, special ones included;
    what is longer goes in windows or is refused. `chat_template` (Jinja, as that of a tokenizer) makes a text of
    messages; without it the head takes texts alone. `command` trains it again, on data of the hashes in `data_sha256`
    by their names, and `scores` are what it reached on data that it had not seen.
    """

    encoder: Annotated[str, Field(min_length=1, max_length=4_000)]
    encoder_sha256: Hash
    labels: Annotated[list[Name], Field(min_length=1), at_most(1_000)]
    max_tokens: Annotated[int, Field(ge=8, le=1_000_000)]
    chat_template: Annotated[str, Field(max_length=20_000)] | None = None
    command: Annotated[str, Field(max_length=2_000)]
    data_sha256: Annotated[dict[Name, Hash], at_most(100)]
    scores: Annotated[dict[Name, float], at_most(100)]


def save(folder: Path, head: Head, weight: Array, bias: Array) -> None:
    """Writes a head into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.ascontiguousarray(weight), "bias": np.ascontiguousarray(bias)}, folder / WEIGHTS)
    (folder / HEAD).write_text(head.model_dump_json(indent=2) + "\n")


def load(folder: Path) -> tuple[Head, Array, Array]:
    """A head, its weight and its bias. Raises BadInput where the folder holds no whole one."""
    try:
        head = Head.model_validate_json((folder / HEAD).read_bytes())
        arrays = load_file(folder / WEIGHTS)
    except ValidationError as error:
        raise BadInput(f"{folder / HEAD}: {describe(error)}") from error
    except (OSError, SafetensorError) as error:
        raise BadInput(f"the head in {folder} cannot be read: {error}") from error
    weight, bias = arrays.get("weight"), arrays.get("bias")
    labels = len(head.labels)
    if weight is None or bias is None or weight.ndim != 2 or len(weight) != labels or bias.shape != (labels,):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise BadInput(
            f"{folder / WEIGHTS} holds {shapes}; allowed: weight ({labels}, dimensions) and bias ({labels},)"
        )
    return head, weight.astype(np.float32), bias.astype(np.float32)


def encoder_sha256(folder: Path) -> str:
    """The hash of an embedding model's weights, by which a head knows its own. Raises OSError."""
    return sha256(folder / ENCODER_WEIGHTS)


def sha256(file: Path) -> str:
    """The hash of a file. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
