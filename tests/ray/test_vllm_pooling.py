"""Sequence classifiers by vLLM's pooling, beside transformers. It is for GPUs; here the same functions run on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(95))]
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]
# In a process of its own, with which its engines end.
CODE = """
import json, sys
from pathlib import Path
from serve_apps import vllm_pooling

if __name__ == "__main__":
    found = {}
    for folder in map(Path, sys.argv[3:]):
        found[folder.name] = {"supported": vllm_pooling.supports(folder)}
        try:
            logits = vllm_pooling.logits_of(folder, 64, 4, dtype="float32", enforce_eager=True)
            found[folder.name]["logits"] = logits(json.loads(sys.argv[2])).tolist()
        except (ValueError, RuntimeError) as error:
            found[folder.name]["error"] = str(error)
    Path(sys.argv[1]).write_text(json.dumps(found))
"""
SIZES: dict[str, Any] = dict(
    vocab_size=len(WORDS), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A decoder with one score, and one without a head, as folders of these names."""
    torch.manual_seed(0)
    llama = LlamaConfig(num_key_value_heads=2, num_labels=1, pad_token_id=0, **SIZES)
    made: dict[str, Any] = {
        "decoder": LlamaForSequenceClassification(llama),
        "headless": LlamaForCausalLM(llama),
    }
    folder = tmp_path_factory.mktemp("models")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    for name, model in made.items():
        model.eval().save_pretrained(folder / name)
        BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / name)
    config = json.loads((folder / "headless" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "headless" / "config.json").write_text(json.dumps(config))
    return {"folder": folder, **made}


def test_logits_are_those_of_transformers_and_a_missing_head_is_told(models: dict[str, Any], tmp_path: Path) -> None:
    program, told = tmp_path / "program.py", tmp_path / "found.json"
    program.write_text(CODE)
    folders = [str(models["folder"] / name) for name in ("decoder", "headless")]
    command = [sys.executable, str(program), str(told), json.dumps(TEXTS), *folders]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(told.read_text())
    with torch.inference_mode():
        expected = [models["decoder"](torch.tensor([text])).logits[0].numpy() for text in TEXTS]
    assert found["decoder"]["supported"]
    assert np.array(found["decoder"]["logits"]) == pytest.approx(np.stack(expected), abs=1e-3)
    assert "logits" not in found["headless"], "a head that is missing is not drawn at random"
    assert "score.weight" in found["headless"]["error"]
