"""Sequence classifiers by vLLM's pooling: texts of all lengths go through the model together, none is padded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from serve_apps.batching import Rows, Tokens

# Which share of its part of a GPU a replica takes for weights, activations and what the engine remembers.
GPU_SHARE = 0.9


def supports(folder: Path) -> bool:
    """Whether vLLM has the architecture of a folder's model, as one that classifies."""
    from vllm import EngineArgs

    try:
        EngineArgs(model=str(folder), runner="pooling").create_model_config()
    except ValueError:  # so vLLM says that it has not
        return False
    return True


def logits_of(folder: Path, max_tokens: int, max_batch: int, **engine: Any) -> Callable[[list[Tokens]], Rows]:
    """The function that gives tokenized texts of at most `max_tokens` their logits: (texts, labels).

    `engine` are other arguments of vLLM's engine. Raises ValueError for weights without a head.
    """
    from vllm import LLM, PoolingParams
    from vllm.inputs import TokensPrompt

    model = LLM(
        model=str(folder),
        runner="pooling",
        load_format="safetensors",  # weights in files that can hold code are not read
        max_model_len=max_tokens,
        max_num_seqs=max_batch,
        **engine,
    )
    # Probabilities are the shields' business, and scores of reward models are none.
    as_they_are = PoolingParams(use_activation=False)

    def logits(texts: list[Tokens]) -> Rows:
        prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in texts]
        pooled = model.encode(prompts, as_they_are, pooling_task="classify", use_tqdm=False)
        return np.stack([one.outputs.data.float().cpu().numpy() for one in pooled])

    return logits
