"""What a model learns, as tokens: made once for all workers, before they start.

Ray Data reads the rows and turns them into tokens, a block at a time; what comes of it is written to one Arrow file in
the job's folder, in the order of the rows. The workers map that file into their memory, and each takes its share of
every batch from it, so that none holds the data set, and a training that is gone on with finds the same examples.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import ray.data
from ray.data.context import DataContext

from jobs import dataset_source
from stack import datasets
from stack.api.post_training import TooLong, TrainingConfig
from stack.context import Context
from stack.datasets import Shape
from stack.errors import BadInput
from stack.prompt_formats import PromptFormat, template_messages
from stack.training_rows import DIALOGS, PREFERENCES

# What the trainers call what they learn: the columns of tokens that they take.
Kind = Literal["sft", "dpo", "reward"]
SHAPES: dict[Kind, Shape[Any]] = {"sft": DIALOGS, "dpo": PREFERENCES, "reward": PREFERENCES}
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "sft": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "reward": ("chosen_ids", "rejected_ids"),
}
# How many rows become tokens at once.
BATCH_ROWS = 256
# What the loss leaves out, in PyTorch.
IGNORED = -100
Tokens = dict[str, list[int]]


@dataclass(frozen=True)
class Prepared:
    """An Arrow file of examples, and what became of the rows: those that were too long were cut or dropped.

    `examples` is how many there are in the file, where several may share one; `tokens` are those of all.
    """

    file: str
    examples: int
    rows: int
    tokens: int
    cut: int
    dropped: int


def prepare(
    context: Context,
    checked: datasets.Checked,
    kind: Kind,
    model: tuple[Path, PromptFormat],
    training: TrainingConfig,
    limit: int,
    folder: Path,
) -> Prepared:
    """Turns a data set into tokens of a model, which is its folder and its prompt format, of at most `limit` each.

    What an earlier attempt has made in this folder is taken as it is. Raises BadInput, naming the row, for one that the
    model's chat template cannot say, and where a row is too long and that is to be refused, or nothing is left.
    """
    about = folder / "prepared.json"
    if about.is_file():
        return Prepared(**json.loads(about.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "examples.arrow"
    data = DataContext.get_current()
    data.execution_options.preserve_order = True
    data.enable_progress_bars = False  # they would fill the job's log
    as_tokens: Any = partial(tokenize, kind=kind, folder=str(model[0]), format=model[1])
    tokenized = dataset_source.rows(context, checked, SHAPES[kind]).map_batches(
        as_tokens, batch_size=BATCH_ROWS, num_cpus=0
    )
    prepared = _write(tokenized, kind, training.too_long, limit, file)
    if training.packing:
        prepared = _pack(prepared, limit)
    temporary = about.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(prepared)))
    temporary.rename(about)
    return prepared


def tokenize(batch: dict[str, Any], kind: Kind, folder: str, format: PromptFormat) -> pyarrow.Table:
    """Rows as tokens, in the columns of the kind of training; `problem` says what is wrong with one."""
    tokenizer = _tokenizer(folder)
    say = partial(render, tokenizer, format)
    made = [_tokens(kind, tokenizer, say, json.loads(value)) for value in batch["value"]]
    columns = {name: [one.get(name, []) for one in made] for name in COLUMNS[kind]}
    arrays = {name: pyarrow.array(values, pyarrow.list_(pyarrow.int32())) for name, values in columns.items()}
    problems = pyarrow.array([one.get("problem", "") for one in made])
    return pyarrow.table(arrays | {"row": pyarrow.array(batch["row"]), "problem": problems})


@cache
def _tokenizer(folder: str) -> Any:
    """A worker of Ray Data keeps it for its next batch."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _tokens(kind: Kind, tokenizer: Any, say: "Render", value: dict[str, Any]) -> dict[str, Any]:
    try:
        if kind == "sft":
            return {**dialog_tokens(tokenizer, say, **value)}
        pair = preference_tokens(tokenizer, say, **value)
    except BadInput as error:
        return {"problem": error.message}
    if kind == "dpo":
        return {**pair}
    return {name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")}


Render = Callable[[list[dict[str, Any]], bool], str]


def render(tokenizer: Any, format: PromptFormat, messages: list[dict[str, Any]], ask: bool) -> str:
    """Messages as the model's chat template writes them; with `ask` up to where the assistant speaks next."""
    if tokenizer.chat_template is None:
        raise BadInput("the model has no chat template: it learns from a column `text` of type text alone")
    told = template_messages(format, messages)
    text: str = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=ask)
    return text


def dialog_tokens(tokenizer: Any, render: Render, messages: list[dict[str, Any]], text: str | None) -> Tokens:
    """The tokens of a dialog, of which the assistant's count, or of a text and its end, which all count.

    Raises BadInput where the template writes earlier messages in another way when others follow.
    """
    if text is not None:
        if tokenizer.eos_token_id is None:
            raise BadInput("the model's tokenizer has no token that ends a text, and learns from dialogs alone")
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": ids}
    whole = render(messages, False)
    spans = []
    for number, message in enumerate(messages):
        if number and message["role"] == "assistant":
            before, upto = render(messages[:number], True), render(messages[: number + 1], False)
            _require_start(upto, before)
            _require_start(whole, upto)
            spans.append((len(before), len(upto)))
    ids, starts = _encoded(tokenizer, whole)
    counts = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        counts |= (starts >= first) & (starts < last)
    return {"input_ids": ids, "labels": np.where(counts, ids, IGNORED).tolist()}


def preference_tokens(
    tokenizer: Any, render: Render, messages: list[dict[str, Any]], chosen: str, rejected: str
) -> Tokens:
    """The tokens of a prompt and of its two answers. Raises as `dialog_tokens` does."""
    prompt = render(messages, True)
    wholes = [render([*messages, dict(role="assistant", content=answer)], False) for answer in (chosen, rejected)]
    for whole in wholes:
        _require_start(whole, prompt)
    (one, starts), (other, other_starts) = (_encoded(tokenizer, whole) for whole in wholes)
    end = int(min(np.searchsorted(starts, len(prompt)), np.searchsorted(other_starts, len(prompt))))
    while one[:end] != other[:end]:  # a token may hold the prompt's end and an answer's beginning, a line break each
        end -= 1
    return {"prompt_ids": one[:end], "chosen_ids": one[end:], "rejected_ids": other[end:]}


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], Any]:
    """The tokens of what a template has written, and where in the text each begins."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], np.array([start for start, _ in encoded["offset_mapping"]])


def _require_start(text: str, start: str) -> None:
    if not text.startswith(start):
        raise BadInput("the model's chat template writes a message in another way when others follow it")


def fit(kind: Kind, tokens: Tokens, limit: int, too_long: TooLong) -> tuple[Tokens | None, bool]:
    """An example of at most `limit` tokens, or None where nothing is left to learn, and whether it was too long."""
    longest = length(kind, tokens)
    if longest <= limit:
        return tokens, False
    if too_long == TooLong.refuse:
        raise BadInput(f"has {longest} tokens; allowed: {limit} (max_length, or too_long: cut or drop)")
    if too_long == TooLong.drop:
        return None, True
    if kind == "sft":
        cut = {name: values[:limit] for name, values in tokens.items()}
        return (cut if any(label != IGNORED for label in cut["labels"]) else None), True
    left = limit - len(tokens["prompt_ids"]) if kind == "dpo" else limit
    cut = tokens | {name: tokens[name][: max(0, left)] for name in ("chosen_ids", "rejected_ids")}
    return (cut if cut["chosen_ids"] != cut["rejected_ids"] else None), True


def length(kind: Kind, tokens: Tokens) -> int:
    """How many tokens the longest sequence of an example has."""
    if kind == "sft":
        return len(tokens["input_ids"])
    return len(tokens.get("prompt_ids", ())) + max(len(tokens["chosen_ids"]), len(tokens["rejected_ids"]))


def _write(tokenized: ray.data.Dataset, kind: Kind, too_long: TooLong, limit: int, file: Path) -> Prepared:
    columns = COLUMNS[kind]
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in columns])
    examples = rows = tokens = cut = dropped = 0
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in tokenized.iter_batches(batch_size=BATCH_ROWS, batch_format="pyarrow"):
            fitting: list[Tokens] = []
            for row in batch.to_pylist():  # type: ignore[union-attr]  # it is the table that was asked for
                rows += 1
                example, was_too_long = _checked(row, kind, limit, too_long)
                if example is None:
                    dropped += 1
                else:
                    cut += was_too_long
                    tokens += sum(len(example[name]) for name in columns if name != "labels")
                    fitting.append(example)
            examples += len(fitting)
            writer.write_table(pyarrow.Table.from_pylist(fitting, schema))
    if not examples:
        raise BadInput(f"no row has anything to learn within {limit} tokens; allowed: a greater max_length")
    return Prepared(str(file), examples, rows, tokens, cut, dropped)


def _checked(row: dict[str, Any], kind: Kind, limit: int, too_long: TooLong) -> tuple[Tokens | None, bool]:
    try:
        if row["problem"]:
            raise BadInput(row["problem"])
        return fit(kind, {name: row[name] for name in COLUMNS[kind]}, limit, too_long)
    except BadInput as error:
        raise BadInput(f"row {row['row']}: {error.message}") from error


def _pack(prepared: Prepared, limit: int) -> Prepared:
    """Short examples share rows of `limit` tokens; a column `seq_lengths` says where one ends."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()  # which would fill the job's log
    packed = pack_dataset(Dataset.from_file(prepared.file), limit, "bfd")
    (cached,) = packed.cache_files
    return Prepared(cached["filename"], len(packed), prepared.rows, prepared.tokens, prepared.cut, prepared.dropped)


def described(name: str, prepared: Prepared) -> str:
    """What a job's log says of its data."""
    said = f"{name}: {prepared.rows} rows, {prepared.tokens} tokens"
    if prepared.examples != prepared.rows - prepared.dropped:
        said += f", packed into {prepared.examples}"
    if prepared.cut or prepared.dropped:
        said += f"; too long: {prepared.cut} cut, {prepared.dropped} dropped"
    return said
