"""What is learned from real preferences: of held-out pairs, how often the better answer is told from the worse one.

    scripts/bench preferences [--json FILE]

Trains on the pairs of scripts/preferences.py that are not for the test, by jobs on a Ray of the bench's own, as
`ray job submit` starts them: a LoRA adapter by direct preference optimization, and a reward model. Both are then loaded
as anyone would, by plain transformers and peft, and asked about the test pairs. Which answer is better they say by

  reward           the reward model's number
  implicit reward  log(policy / reference) of an answer, which DPO trains (Rafailov et al. 2023, arXiv 2305.18290, and
                   so measured by Lambert et al. 2024, arXiv 2403.13787); before the training both are the same, all
                   pairs are ties, and the accuracy is 0.5 by definition
  likelihood       log(policy) of an answer: which one the model itself would rather give (the ranking accuracy of Chen
                   et al. 2024, arXiv 2405.19534), before and after; and the same per token, as the sum favours the
                   shorter answer (Meng et al. 2024, arXiv 2405.14734)

Beside them stands what the length of the answers alone tells. The exit status is 1 if a target is missed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts import local_stack, preferences
from scripts.bench_servers import BenchFailed, local_model
from scripts.bench_trainings import enter_home, prepared_data, run, running_ray, say, submission
from scripts.figures import Figure, Share, write_json, write_shares, write_table
from scripts.preferences import Pair
from stack import post_training
from stack.config import Config
from stack.context import Context

SEED, RANK, BATCH_SIZE, MAX_TOKENS = 0, 16, 4, 256
DPO, REWARD = "preference_optimize", "train_reward_model"
EPOCHS = {DPO: 1, REWARD: 2}
LR = {DPO: 5e-4, REWARD: 5e-4}
BETA = 0.1
# Targets: what the untrained policy reaches by definition, and what a reward model is to be above.
CHANCE, REWARD_ACCURACY = 0.5, 0.6


@dataclass(frozen=True)
class Answer:
    """What a language model thinks of an answer: the log-probability of its tokens, added up, and how many they are."""

    log_probability: float
    tokens: int


@dataclass(frozen=True)
class Judged:
    """A test pair as each model sees it: of the chosen answer the first, of the rejected one the second."""

    pair: Pair
    base: tuple[Answer, Answer]
    policy: tuple[Answer, Answer]
    rewards: tuple[float, float]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench preferences", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
        try:
            judged, seconds = measure(Path(folder))
        except (BenchFailed, local_stack.StartFailed) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    shares = found(judged)
    figures = [Figure(f"{name}, with its start", "s", of_job) for name, of_job in seconds.items()]
    print(f"{write_shares(shares)}\n\n{write_table(figures)}")
    if arguments.json is not None:
        write_json(arguments.json, [*shares, *figures], bench="preferences", judged=[asdict(one) for one in judged])
    return 0 if all(one.met for one in shares) else 1


# Running it


def measure(folder: Path) -> tuple[list[Judged], dict[str, float]]:
    """What the models say of each test pair, and how long each job took, in seconds."""
    splits = preferences.split(preferences.read_pairs(prepared_data("preferences")))
    data = enter_home(folder) / "data"
    data.mkdir()
    # The validation pairs have chosen the settings above, and may be learned from as well.
    rows = preferences.write([*splits["train"], *splits["validation"]], data / "train.jsonl")
    seconds = {}
    with running_ray() as address:
        for job in (DPO, REWARD):
            say(f"{job}: {EPOCHS[job]} epochs")
            start, request = time.monotonic(), folder / f"{job}.json"
            request.write_text(json.dumps(request_of(job, rows)))
            run(job, submission(address, f"jobs.{job}", request), folder / f"{job}.log")
            seconds[job] = time.monotonic() - start
    say(f"scoring {len(splits['test'])} test pairs")
    return judge(splits["test"]), seconds


def request_of(job: str, rows: Path) -> dict[str, Any]:
    """The request of a job, which is its own `job_uuid`."""
    lora = {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "rank": RANK,
        "alpha": 2 * RANK,
    }
    of_job: dict[str, dict[str, Any]] = {
        DPO: {
            "finetuned_model": local_model().id,
            "algorithm": "dpo",
            "algorithm_config": {"beta": BETA},
            "lora_config": lora,
        },
        REWARD: {"model": local_model().id, "algorithm": "lora", "algorithm_config": lora},
    }
    return of_job[job] | {
        "job_uuid": job,
        "dataset": {"columns": preferences.COLUMNS, "content_url": rows.as_uri()},
        "optimizer_config": {"optimizer_type": "adamw", "lr": LR[job], "lr_min": 0.0, "weight_decay": 0.0},
        "training_config": {
            "n_epochs": EPOCHS[job],
            "n_iters": 0,
            "batch_size": BATCH_SIZE,
            "shuffle": True,
            "seed": SEED,
            "max_length": MAX_TOKENS,
            "too_long": "cut",
        },
    }


def judge(pairs: Sequence[Pair]) -> list[Judged]:
    """Asks the base model and what the jobs have published of it about each pair."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    with closing(Context.open(Config.from_environment())) as context:
        adapter, reward_model = (
            context.artifacts.local(post_training.artifact_name(context.tenant, job, whole))
            for job, whole in ((DPO, False), (REWARD, True))
        )
        base = local_model().folder
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        of_base = log_probabilities(model, tokenizer, pairs)
        of_policy = log_probabilities(PeftModel.from_pretrained(model, adapter).merge_and_unload(), tokenizer, pairs)
        model = AutoModelForSequenceClassification.from_pretrained(reward_model)
        of_rewards = rewards(model, AutoTokenizer.from_pretrained(reward_model), pairs)
    return [Judged(*one) for one in zip(pairs, of_base, of_policy, of_rewards, strict=True)]


def log_probabilities(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> list[tuple[Answer, Answer]]:
    """What a language model thinks of the two answers of each pair, to their questions."""
    import torch

    def of_answer(pair: Pair, answer: str) -> Answer:
        ids, start = _tokens(tokenizer, pair.prompt, answer)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        chosen = torch.log_softmax(logits.float(), dim=-1)[torch.arange(len(ids) - start), ids[start:]]
        return Answer(float(chosen.sum()), len(ids) - start)

    model.eval()
    return [(of_answer(pair, pair.chosen), of_answer(pair, pair.rejected)) for pair in pairs]


def rewards(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """What a reward model gives the two answers of each pair."""
    import torch

    def of_answer(pair: Pair, answer: str) -> float:
        ids, _ = _tokens(tokenizer, pair.prompt, answer)
        with torch.inference_mode():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    model.eval()
    return [(of_answer(pair, pair.chosen), of_answer(pair, pair.rejected)) for pair in pairs]


def _tokens(tokenizer: Any, prompt: list[dict[str, str]], answer: str) -> tuple[list[int], int]:
    """A prompt and its answer by the chat template, and at which of the tokens the answer begins."""
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    start = next(number for number, (first, _) in enumerate(encoded["offset_mapping"]) if first >= len(asked))
    return encoded["input_ids"], start


# Figures


def found(judged: Sequence[Judged]) -> list[Share]:
    """How often each way of telling is right, with the targets."""
    base, policy = [one.base for one in judged], [one.policy for one in judged]
    shorter = _share("the shorter answer", [len(one.pair.rejected) - len(one.pair.chosen) for one in judged])
    return [
        _share(
            "reward model", [chosen - rejected for chosen, rejected in (one.rewards for one in judged)], REWARD_ACCURACY
        ),
        _share("DPO: implicit reward (before: 0.5)", implicit_margins(base, policy), CHANCE, surely=True),
        _share("likelihood, before", likelihood_margins(base)),
        _share("likelihood, after DPO", likelihood_margins(policy)),
        _share("likelihood per token, before", likelihood_margins(base, per_token=True)),
        _share("likelihood per token, after DPO", likelihood_margins(policy, per_token=True)),
        shorter,
        Share("the longer answer", shorter.of - shorter.right, shorter.of),
    ]


def implicit_margins(base: Sequence[tuple[Answer, Answer]], policy: Sequence[tuple[Answer, Answer]]) -> list[float]:
    """By how much the policy's log(policy / base) is greater for the chosen answer than for the rejected one.

    The reward that DPO trains is this times beta, which changes no sign.
    """
    return [after - before for before, after in zip(likelihood_margins(base), likelihood_margins(policy), strict=True)]


def likelihood_margins(answers: Sequence[tuple[Answer, Answer]], per_token: bool = False) -> list[float]:
    """By how much the log-probability of the chosen answer is greater, or its mean over the tokens."""
    return [
        chosen.log_probability / (chosen.tokens if per_token else 1)
        - rejected.log_probability / (rejected.tokens if per_token else 1)
        for chosen, rejected in answers
    ]


def _share(name: str, margins: Sequence[float], above: float | None = None, surely: bool = False) -> Share:
    right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
    return Share(name, right, len(margins), above, surely)


if __name__ == "__main__":
    sys.exit(main())
