"""Writes llama3_tokens.json: the golden prompts of Llama 3 in the tokens of its own tokenizer.

    pip download --no-deps llama-models==0.3.0
    unzip llama_models-0.3.0-py3-none-any.whl models/llama3/tokenizer.model
    python tests/unit/golden/make_tokens.py models/llama3/tokenizer.model

Each token stands with its text; bytes that are no text of their own are written as Python's surrogate escapes. Special
tokens are recognized wherever they stand in the prompt, as the engine's tokenizer does.
"""

import json
import sys
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe

HERE = Path(__file__).parent
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
}


def main(model: str) -> None:
    tokenizer = tiktoken.Encoding(
        "llama3", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(model), special_tokens=SPECIAL
    )
    tokens = {file.stem: encoded(tokenizer, file.read_text()) for file in sorted(HERE.glob("llama3_*.txt"))}
    lines = [f"{json.dumps(name)}: {json.dumps(pairs)}" for name, pairs in tokens.items()]
    (HERE / "llama3_tokens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def encoded(tokenizer: tiktoken.Encoding, text: str) -> list[tuple[int, str]]:
    tokens = tokenizer.encode(text, allowed_special="all")
    return [(one, tokenizer.decode_single_token_bytes(one).decode(errors="surrogateescape")) for one in tokens]


if __name__ == "__main__":
    main(sys.argv[1])
