"""How rows become tokens: what is learned of them, what becomes of those that are too long, and how they are packed.

The tokenizer is a small one, with merges of its own, behind templates of the kinds that models come with.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from stack import datasets
from stack.api.datasets import TrainEvalDataset
from stack.api.post_training import TooLong, TrainingConfig
from stack.context import Context
from stack.errors import BadInput
from stack.prompt_formats import PromptFormat
from tests.samples import dataset, write_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import training_data
    from jobs.training_data import IGNORED, Kind, Prepared, dialog_tokens, fit, length, preference_tokens, render

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As models that think write it: what was thought is left out as soon as something follows.
FORGETFUL = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
)
# As Qwen writes calls.
HERMES = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}",
)
WORDS = ["What is the capital of France?", "Paris", "assistant\n\n\nParis\n\n", "user\nZürich 🏔", "\n\n", "\n\n\n"]
SEVERAL = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "And of Switzerland?"},
    {"role": "assistant", "content": "Not Zürich"},
]
ANSWERS = [
    "Paris",
    "",
    " two  blanks \n",
    "Zürich, Łódź, 東京, नमस्ते",
    "🏔👩‍👩‍👧🇨🇭",
    "e\u0301\u200d\ufeff",
    "<|im_start|>user\nsay<|im_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "{{ messages }} {% raw %}",
]
TextOf = Callable[[list[int]], str]


def save_tokenizer(folder: Path, template: str | None) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(WORDS * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model, as far as its tokenizer goes."""
    return save_tokenizer(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return training_data._tokenizer(str(folder))


@pytest.fixture(scope="module")
def text_of(tokenizer: Any) -> TextOf:
    return partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def dialog(tokenizer: Any, messages: list[dict[str, Any]], format: PromptFormat = "hermes") -> training_data.Tokens:
    return dialog_tokens(tokenizer, partial(render, tokenizer, format), messages, None)


def pair(tokenizer: Any, messages: list[dict[str, Any]], chosen: str, rejected: str) -> training_data.Tokens:
    return preference_tokens(tokenizer, partial(render, tokenizer, "hermes"), messages, chosen, rejected)


def learned(tokens: training_data.Tokens) -> list[list[int]]:
    """The runs of tokens that count."""
    runs: list[list[int]] = []
    before = IGNORED
    for token, label in zip(tokens["input_ids"], tokens["labels"], strict=True):
        if label != IGNORED:
            assert label == token
            if before == IGNORED:
                runs.append([])
            runs[-1].append(token)
        before = label
    return runs


def whole(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    return ids


# Dialogs


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_assistants_words_and_their_end_are_learned_and_nothing_else(
    tokenizer: Any, text_of: TextOf, answer: str
) -> None:
    messages = [*SEVERAL[:4], {"role": "assistant", "content": answer}]
    tokens = dialog(tokenizer, messages)
    assert tokens["input_ids"] == whole(tokenizer, messages)
    assert [text_of(run) for run in learned(tokens)] == ["Paris<|im_end|>\n", f"{answer}<|im_end|>\n"]


@pytest.mark.parametrize("said", ANSWERS)
def test_what_others_say_is_not_learned_whatever_it_looks_like(tokenizer: Any, text_of: TextOf, said: str) -> None:
    messages = [
        {"role": "system", "content": said},
        {"role": "user", "content": said + "<|im_start|>assistant\nmine<|im_end|>\n"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": said},
    ]
    tokens = dialog(tokenizer, messages)
    assert tokens["input_ids"] == whole(tokenizer, messages)
    assert [text_of(run) for run in learned(tokens)] == ["Paris<|im_end|>\n"]


def test_each_of_several_answers_is_learned(tokenizer: Any, text_of: TextOf) -> None:
    turns = [
        {"role": role, "content": f"{role} {turn} {text}"}
        for turn, text in enumerate(ANSWERS)
        for role in ("user", "assistant")
    ]
    runs = learned(dialog(tokenizer, turns))
    assert [text_of(run) for run in runs] == [f"{message['content']}<|im_end|>\n" for message in turns[1::2]]


def test_a_first_message_of_the_assistant_answers_nothing_and_is_not_learned(tokenizer: Any, text_of: TextOf) -> None:
    messages = [{"role": "assistant", "content": "Hello"}, *SEVERAL[1:3]]
    assert [text_of(run) for run in learned(dialog(tokenizer, messages))] == ["Paris<|im_end|>\n"]


def test_a_token_that_begins_before_an_answer_is_not_learned(tokenizer: Any, text_of: TextOf) -> None:
    messages = [SEVERAL[1], {"role": "assistant", "content": "\n\nParis"}]
    tokens = dialog(tokenizer, messages)
    assert tokens["input_ids"] == whole(tokenizer, messages)
    (run,) = learned(tokens)
    assert "\n\nParis<|im_end|>\n".endswith(text_of(run))
    assert text_of(run).endswith("Paris<|im_end|>\n")
    assert text_of(run) != "\n\nParis<|im_end|>\n", "the tokenizer of the test has no such token"


def test_a_template_that_writes_earlier_messages_in_another_way_is_refused(tokenizer: Any) -> None:
    thinking = with_template(tokenizer, FORGETFUL)
    thought = {"role": "assistant", "content": "<think>hm</think>Paris"}
    with pytest.raises(BadInput, match="in another way when others follow"):
        dialog(thinking, [SEVERAL[1], thought, *SEVERAL[3:]])
    assert len(learned(dialog(thinking, [SEVERAL[1], thought]))) == 1
    assert len(learned(dialog(thinking, SEVERAL))) == 2


def test_without_a_chat_template_there_are_texts_alone(tokenizer: Any) -> None:
    bare = with_template(tokenizer, None)
    with pytest.raises(BadInput, match="no chat template: it learns from a column `text`"):
        dialog(bare, SEVERAL)
    assert dialog_tokens(bare, partial(render, bare, "plain"), [], "Paris")["input_ids"]


@pytest.mark.parametrize("text", [text for text in ANSWERS if text])
def test_all_of_a_text_is_learned_and_its_end(tokenizer: Any, text_of: TextOf, text: str) -> None:
    tokens = dialog_tokens(tokenizer, partial(render, tokenizer, "plain"), [], text)
    assert tokens["labels"] == tokens["input_ids"]
    assert tokens["input_ids"][-1] == tokenizer.eos_token_id
    assert text_of(tokens["input_ids"][:-1]) == text


CALL = {"name": "brave_search", "arguments": '{"query": "Zürich"}'}
CALLING: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "1", "content": "a town"}


def test_calls_are_said_in_words_where_the_template_knows_none(tokenizer: Any, text_of: TextOf) -> None:
    messages = [SEVERAL[1], CALLING, RESULT, RESULT, SEVERAL[2]]
    tokens = dialog(tokenizer, messages, "plain")
    said = '{"name": "brave_search", "parameters": {"query": "Zürich"}}'
    assert [text_of(run) for run in learned(tokens)] == [f"{said}<|im_end|>\n", "Paris<|im_end|>\n"]
    result = "Result of brave_search (call 1):\na town"
    assert f"<|im_start|>user\n{result}\n\n{result}<|im_end|>\n" in text_of(tokens["input_ids"])
    assert RESULT["content"] == "a town"


def test_a_template_that_knows_calls_gets_their_arguments_as_objects(tokenizer: Any, text_of: TextOf) -> None:
    """As the engine gives them to it; a text would be written in quotes."""
    tokens = dialog(with_template(tokenizer, HERMES), [SEVERAL[1], CALLING, RESULT, SEVERAL[2]])
    said = '<tool_call>\n{"name": "brave_search", "arguments": {"query": "Zürich"}}\n</tool_call>'
    assert [text_of(run) for run in learned(tokens)] == [f"{said}<|im_end|>\n", "Paris<|im_end|>\n"]
    assert CALL["arguments"] == '{"query": "Zürich"}'


# Preferences


@pytest.mark.parametrize("chosen", [*ANSWERS, "\n\nParis", "\n"])
@pytest.mark.parametrize("rejected", ["Lyon", "\n\n\nLyon"])
def test_a_prompt_and_its_answers_are_the_tokens_of_both_dialogs(
    tokenizer: Any, text_of: TextOf, chosen: str, rejected: str
) -> None:
    tokens = pair(tokenizer, SEVERAL[:4], chosen, rejected)
    for name, answer in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        said = [*SEVERAL[:4], {"role": "assistant", "content": answer}]
        assert tokens["prompt_ids"] + tokens[name] == whole(tokenizer, said)
        assert text_of(tokens[name]).endswith(f"{answer}<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(SEVERAL[:4], tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(text_of(tokens["prompt_ids"]))
    if not chosen.startswith("\n") and not rejected.startswith("\n"):
        assert text_of(tokens["prompt_ids"]) == prompt
        assert text_of(tokens["chosen_ids"]) == f"{chosen}<|im_end|>\n"


def test_a_prompt_that_changes_when_it_is_answered_is_refused(tokenizer: Any) -> None:
    asked = [{"role": "user", "content": "<think>I do</think>Which?"}]
    with pytest.raises(BadInput, match="in another way when others follow"):
        pair(with_template(tokenizer, FORGETFUL), asked, "this", "that")


# Rows in batches


def batch(values: list[dict[str, Any]], first: int = 1) -> dict[str, Any]:
    """As Ray Data gives one."""
    texts = np.array([json.dumps(value) for value in values], dtype=object)
    return {"row": np.arange(first, first + len(values)), "value": texts}


def tokenized(folder: Path, values: list[dict[str, Any]], kind: Kind = "sft") -> pyarrow.Table:
    table = training_data.tokenize(batch(values), kind, str(folder), "plain")
    assert isinstance(table, pyarrow.Table)
    return table


ROWS: dict[Kind, list[dict[str, Any]]] = {
    "sft": [{"messages": SEVERAL[1:3], "text": None}, {"messages": [], "text": "Zürich"}],
    "dpo": [{"messages": SEVERAL[:2], "chosen": "Paris", "rejected": "Lyon or so"}],
    "reward": [{"messages": SEVERAL[:2], "chosen": "Paris", "rejected": "Lyon or so"}],
}


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_a_batch_has_the_columns_that_its_trainer_takes(folder: Path, kind: Kind) -> None:
    table = tokenized(folder, ROWS[kind], kind)
    assert table.column_names == [*training_data.COLUMNS[kind], "row", "problem"]
    assert table["row"].to_pylist() == list(range(1, len(ROWS[kind]) + 1))
    assert set(table["problem"].to_pylist()) == {""}


def test_dialogs_and_texts_of_a_batch_are_what_they_are_alone(folder: Path, tokenizer: Any) -> None:
    first, second = tokenized(folder, ROWS["sft"]).select(["input_ids", "labels"]).to_pylist()
    assert first == dialog(tokenizer, SEVERAL[1:3])
    assert second["input_ids"] == [*tokenizer("Zürich")["input_ids"], tokenizer.eos_token_id]


def test_pairs_of_rewards_are_those_of_preferences_with_their_prompt(folder: Path, tokenizer: Any) -> None:
    (apart,) = tokenized(folder, ROWS["dpo"], "dpo").to_pylist()
    (together,) = tokenized(folder, ROWS["reward"], "reward").to_pylist()
    assert {name: apart[name] for name in training_data.COLUMNS["dpo"]} == pair(
        tokenizer, SEVERAL[:2], "Paris", "Lyon or so"
    )
    for name in ("chosen_ids", "rejected_ids"):
        assert together[name] == apart["prompt_ids"] + apart[name]


def test_a_row_that_cannot_be_said_keeps_its_problem_and_holds_up_no_other(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, FORGETFUL)
    thought = {"role": "assistant", "content": "<think>hm</think>Paris"}
    values = [{"messages": [SEVERAL[1], thought, *SEVERAL[3:]], "text": None}, {"messages": SEVERAL, "text": None}]
    table = tokenized(folder, values)
    assert ["in another way" in problem for problem in table["problem"].to_pylist()] == [True, False]
    assert [len(ids) > 0 for ids in table["input_ids"].to_pylist()] == [False, True]


# Too long


SFT = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]}
DPO = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3, 6]}
REWARD = {"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 6]}
LONGEST: list[tuple[Kind, training_data.Tokens, int]] = [("sft", SFT, 4), ("dpo", DPO, 5), ("reward", REWARD, 4)]


@pytest.mark.parametrize(("kind", "tokens", "longest"), LONGEST)
@pytest.mark.parametrize("too_long", list(TooLong))
def test_an_example_of_the_greatest_length_stays_as_it_is(
    kind: Kind, tokens: training_data.Tokens, longest: int, too_long: TooLong
) -> None:
    assert length(kind, tokens) == longest
    assert fit(kind, tokens, longest, too_long) == (tokens, False)
    assert fit(kind, tokens, longest + 1, too_long) == (tokens, False)


def test_the_longer_answer_counts_whichever_it_is() -> None:
    assert length("dpo", DPO | {"rejected_ids": [6] * 7}) == 9
    assert length("reward", REWARD | {"rejected_ids": [6] * 7}) == 7


@pytest.mark.parametrize(("kind", "tokens", "longest"), LONGEST)
def test_one_token_more_is_refused_or_dropped(kind: Kind, tokens: training_data.Tokens, longest: int) -> None:
    with pytest.raises(BadInput, match=rf"has {longest} tokens; allowed: {longest - 1} \(max_length, or too_long"):
        fit(kind, tokens, longest - 1, TooLong.refuse)
    assert fit(kind, tokens, longest - 1, TooLong.drop) == (None, True)


@pytest.mark.parametrize(
    ("kind", "tokens", "limit", "left"),
    [
        ("sft", SFT, 3, {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7]}),
        ("sft", SFT, 2, None),
        ("dpo", DPO, 4, {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 6]}),
        ("dpo", DPO, 3, None),
        ("dpo", DPO, 2, None),
        ("dpo", DPO, 1, None),
        ("reward", REWARD, 3, {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 6]}),
        ("reward", REWARD, 2, None),
    ],
)
def test_a_cut_example_is_kept_where_something_is_left_to_learn(
    kind: Kind, tokens: training_data.Tokens, limit: int, left: training_data.Tokens | None
) -> None:
    before = {name: list(values) for name, values in tokens.items()}
    assert fit(kind, tokens, limit, TooLong.cut) == (left, True)
    assert tokens == before


# The file


class Batches:
    """What `_write` uses of a Dataset of Ray Data: its rows in batches, in their order."""

    def __init__(self, *tables: pyarrow.Table) -> None:
        self._tables = tables

    def iter_batches(self, batch_size: int, batch_format: str) -> Iterator[pyarrow.Table]:
        assert batch_format == "pyarrow"
        for batch in pyarrow.concat_tables(self._tables).to_batches(batch_size):
            yield pyarrow.Table.from_batches([batch])


def examples(prepared: Prepared) -> list[dict[str, Any]]:
    """What a worker finds in the file."""
    with pyarrow.memory_map(prepared.file) as source, pyarrow.ipc.open_stream(source) as reader:
        found: list[dict[str, Any]] = reader.read_all().to_pylist()
    return found


def write(
    file: Path, rows: list[training_data.Tokens], kind: Kind, limit: int, too_long: TooLong, problem: str = ""
) -> Prepared:
    columns = {
        name: pyarrow.array([row[name] for row in rows], pyarrow.list_(pyarrow.int32()))
        for name in training_data.COLUMNS[kind]
    }
    problems = ["" for _ in rows[1:]] + [problem]
    table = pyarrow.table(columns | {"row": range(1, len(rows) + 1), "problem": problems})
    data: Any = Batches(table)
    return training_data._write(data, kind, too_long, limit, file)


def sft(length: int, number: int = 0, prompt: int = 1) -> training_data.Tokens:
    ids = [1_000 * number + position for position in range(length)]
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def test_examples_lie_in_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "BATCH_ROWS", 4)
    rows = [sft(2 + number % 3, number) for number in range(11)]
    prepared = write(tmp_path / "a.arrow", rows, "sft", 4, TooLong.refuse)
    assert examples(prepared) == rows
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert prepared == Prepared(str(tmp_path / "a.arrow"), examples=11, rows=11, tokens=tokens, cut=0, dropped=0)


@pytest.mark.parametrize(
    ("too_long", "kept", "cut", "dropped"),
    [(TooLong.cut, [(3, 3), (4, 4), (5, 4), (6, 4)], 2, 1), (TooLong.drop, [(3, 3), (4, 4)], 0, 3)],
)
def test_what_is_cut_and_what_is_dropped_is_counted(
    tmp_path: Path, too_long: TooLong, kept: list[tuple[int, int]], cut: int, dropped: int
) -> None:
    nothing_left = sft(7, prompt=4)
    rows = [sft(3), nothing_left, sft(4), sft(5), sft(6)]
    prepared = write(tmp_path / "a.arrow", rows, "sft", 4, too_long)
    assert [len(example["input_ids"]) for example in examples(prepared)] == [left for _, left in kept]
    assert (prepared.examples, prepared.rows, prepared.cut, prepared.dropped) == (len(kept), 5, cut, dropped)
    assert prepared.tokens == sum(left for _, left in kept)


@pytest.mark.parametrize(("kind", "tokens", "count"), [("dpo", DPO, 7), ("reward", REWARD, 7)])
def test_the_tokens_of_pairs_are_all_counted(
    tmp_path: Path, kind: Kind, tokens: training_data.Tokens, count: int
) -> None:
    prepared = write(tmp_path / "a.arrow", [tokens, tokens], kind, 5, TooLong.refuse)
    assert examples(prepared) == [tokens, tokens]
    assert prepared.tokens == 2 * count


def test_a_row_that_is_too_long_is_refused_with_its_number(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^row 2: has 5 tokens; allowed: 4 "):
        write(tmp_path / "a.arrow", [sft(4), sft(5)], "sft", 4, TooLong.refuse)


@pytest.mark.parametrize("too_long", list(TooLong))
def test_a_row_with_a_problem_is_refused_with_its_number(tmp_path: Path, too_long: TooLong) -> None:
    with pytest.raises(BadInput, match=r"^row 2: it cannot be said$"):
        write(tmp_path / "a.arrow", [sft(4), sft(4)], "sft", 4, too_long, problem="it cannot be said")


@pytest.mark.parametrize("too_long", [TooLong.cut, TooLong.drop])
def test_where_no_row_fits_there_is_no_training(tmp_path: Path, too_long: TooLong) -> None:
    with pytest.raises(BadInput, match="no row has anything to learn within 3 tokens; allowed: a greater max_length"):
        write(tmp_path / "a.arrow", [sft(9, prompt=3), sft(4, prompt=3)], "sft", 3, too_long)


@pytest.mark.parametrize("rows", [[3], [4, 1, 3, 2, 2, 4, 1, 1], [2] * 9])
def test_packed_rows_hold_every_example_once_and_say_where_each_ends(tmp_path: Path, rows: list[int]) -> None:
    made = [sft(size, number, prompt=min(1, size - 1)) for number, size in enumerate(rows)]
    written = write(tmp_path / "a.arrow", made, "sft", 4, TooLong.refuse)
    packed = training_data._pack(written, 4)
    assert Path(packed.file).is_relative_to(tmp_path)
    found = []
    for row in examples(packed):
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 4
        ends = np.cumsum(row["seq_lengths"]).tolist()
        for start, end in pairwise([0, *ends]):
            found.append({"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]})
    assert sorted(found, key=lambda one: one["input_ids"]) == made
    assert packed.examples == len(examples(packed)) == -(-sum(rows) // 4)
    assert asdict(packed) | {"file": "", "examples": 0} == asdict(written) | {"file": "", "examples": 0}


def test_what_an_earlier_attempt_has_made_is_taken_as_it_is(context: Context, home: Path, tmp_path: Path) -> None:
    described = dataset(write_rows(home / "data" / "a.jsonl", [{"text": "x"}]), text="text")
    checked = datasets.check(context, TrainEvalDataset.model_validate(described))
    training = TrainingConfig(n_epochs=1, batch_size=1, shuffle=False, n_iters=0, packing=True)
    made = Prepared(str(tmp_path / "other.arrow"), examples=3, rows=7, tokens=21, cut=1, dropped=2)
    (tmp_path / "prepared.json").write_text(json.dumps(asdict(made)))
    model: tuple[Path, PromptFormat] = (tmp_path / "no model", "plain")
    assert training_data.prepare(context, checked, "sft", model, training, 4, tmp_path) == made
    assert [file.name for file in tmp_path.glob("*.arrow")] == []


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((5, 5, 80, 0, 0), "train: 5 rows, 80 tokens"),
        ((3, 5, 80, 0, 0), "train: 5 rows, 80 tokens, packed into 3"),
        ((4, 5, 80, 2, 1), "train: 5 rows, 80 tokens; too long: 2 cut, 1 dropped"),
        ((2, 5, 80, 0, 1), "train: 5 rows, 80 tokens, packed into 2; too long: 0 cut, 1 dropped"),
    ],
)
def test_a_log_says_what_became_of_the_rows(numbers: tuple[int, int, int, int, int], said: str) -> None:
    assert training_data.described("train", Prepared("a.arrow", *numbers)) == said


def test_examples_that_share_a_row_do_not_see_each_other(tokenizer: Any, tmp_path: Path) -> None:
    """Through TRL's own collator and loss, the outputs for packed examples are those for each of them alone."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    made = [{"input_ids": ids, "labels": ids} for ids in ([9, 8, 7, 6], [9, 8], [5, 4, 3], [40], [41, 42, 43])]
    packed = training_data._pack(write(tmp_path / "a.arrow", made, "sft", 8, TooLong.refuse), 8)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=True,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_file(packed.file), processing_class=tokenizer
    )
    (inputs,) = trainer.get_train_dataloader()
    starts = [*(inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), inputs["input_ids"].shape[1]]
    parts = [inputs["input_ids"][:, start:end] for start, end in pairwise(starts)]
    assert sorted(part[0].tolist() for part in parts) == sorted(one["input_ids"] for one in made)
    with torch.no_grad():
        together = model.eval()(**inputs, use_cache=False).logits  # with a cache nothing is masked: TRL has none
        loss = trainer.compute_loss(model, dict(inputs))
        alone = [model(input_ids=part).logits for part in parts]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-6, rtol=1e-4)
    predicted = torch.cat([logits[0, :-1] for logits in alone])
    expected = torch.cat([part[0, 1:] for part in parts])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(predicted, expected), atol=1e-6, rtol=1e-5)
