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
    folder, texts, told = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    logits = vllm_pooling.logits_of(folder, 64, 4, dtype="float32", enforce_eager=True)
    told.write_text(json.dumps({"supported": vllm_pooling.supports(folder), "logits": logits(texts).tolist()}))
"""
SIZES: dict[str, Any] = dict(
    vocab_size=len(WORDS), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.5,
)  # fmt: skip


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(num_key_value_heads=2, num_labels=1, pad_token_id=0, **SIZES)
    ).eval()
    folder, program, told = tmp_path / "model", tmp_path / "program.py", tmp_path / "found.json"
    model.save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    program.write_text(CODE)
    command = [sys.executable, str(program), str(folder), json.dumps(TEXTS), str(told)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(told.read_text())
    with torch.inference_mode():
        expected = [model(torch.tensor([text])).logits[0].numpy() for text in TEXTS]
    assert found["supported"]
    assert np.array(found["logits"]) == pytest.approx(np.stack(expected), abs=1e-3)
