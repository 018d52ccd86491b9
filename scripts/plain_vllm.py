"""Chats answered by vLLM's own offline `LLM.chat`, beside which `scripts/bench batch` measures jobs.

    python -m scripts.plain_vllm SETTINGS OUTPUT

SETTINGS is a JSON file with the arguments of `answer`. OUTPUT becomes a JSON file with the seconds that the first `few`
rows took, and then all of them, both without start-up, and the tokens that were written for all.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


# fmt: off
def answer(rows: str, engine: dict[str, Any], max_tokens: int, few: int) -> dict[str, float]:
    dialogs = [json.loads(line)["dialog"] for line in Path(rows).read_text().splitlines()]
    llm = LLM(**engine)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    llm.chat(dialogs[:8], sampling, use_tqdm=False)  # warms up
    start = time.perf_counter()
    llm.chat(dialogs[:few], sampling, use_tqdm=False)
    middle = time.perf_counter()
    found = llm.chat(dialogs, sampling, use_tqdm=False)
    end = time.perf_counter()
    tokens = sum(len(one.outputs[0].token_ids) for one in found)
    return {"few_seconds": middle - start, "seconds": end - middle, "tokens": tokens}
# fmt: on


def main() -> None:
    found = answer(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
