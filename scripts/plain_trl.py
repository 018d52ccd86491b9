"""A training with plain TRL, beside which `scripts/bench post_training` measures ours.

    python -m scripts.plain_trl SETTINGS OUTPUT

SETTINGS is a JSON file with the arguments of `train`. OUTPUT becomes a JSON file with lists of each step's loss, and of
the tokens and the seconds since the start.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def on_log(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        state.log_history[-1]["time"] = time.monotonic()


# fmt: off
def train(rows: str, model: str, folder: str, batch_size: int, steps: int, lr: float, seed: int) -> SFTTrainer:
    arguments = SFTConfig(
        output_dir=folder, per_device_train_batch_size=batch_size, max_steps=steps, seed=seed, learning_rate=lr,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.0},
        warmup_steps=round(0.03 * steps), gradient_checkpointing=False, use_cpu=True, bf16=False,
        model_init_kwargs={"dtype": "float32"}, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    data = Dataset.from_json(rows, cache_dir=folder)
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, peft_config=lora, callbacks=[Clock()])
    trainer.train()
    return trainer
# fmt: on


def main() -> None:
    start = time.monotonic()
    trainer = train(**json.loads(Path(sys.argv[1]).read_text()))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    steps = {
        "loss": [log["loss"] for log in logs],
        "tokens": [log["num_tokens"] for log in logs],
        "seconds": [log["time"] - start for log in logs],
    }
    Path(sys.argv[2]).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
