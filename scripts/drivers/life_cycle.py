"""The whole life cycle of a model in one: evaluate, generate, tune, evaluate the better model, and let it work.

    python -m scripts.drivers.life_cycle --train train.jsonl --test test.jsonl
    python -m scripts.drivers.life_cycle --address https://stack.example.com --train train.jsonl --test test.jsonl \\
        --model Llama-3.1-8B-Instruct --workers 8

Both files have a `dialog` in each row that ends with the expected answer. With `--generations N` the model itself makes
the answers to learn: N to each prompt of --train, of which a reward model's favourite is kept (best-of-n). Otherwise it
learns the answers that are there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from scripts.drivers import agent, tune
from scripts.drivers.client import Stack, drive, new_id, say
from scripts.drivers.evaluate import compare, evaluate
from scripts.drivers.generate import generate, register


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="dialogs to learn from")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="dialogs that training never sees")
    parser.add_argument("--model", help="the model to improve (the first one)")
    parser.add_argument(
        "--generations", type=int, default=0, metavar="N", help="answers that the model makes itself (0)"
    )
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="how often every row is seen (1)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows of a step, of all workers (8)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="workers, each with a GPU if there are any (1)"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of an answer (64)")
    parser.add_argument("--ask", metavar="TEXT", help="what the better model is asked in the end, as an agent")
    parser.add_argument("--name", help="what all jobs and data sets of the run begin with")


def run(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    name = arguments.name or new_id("cycle")
    model = arguments.model or tune.first_model(stack)
    test = register(stack, f"{name}-test", arguments.test)
    data = register(stack, f"{name}-train", arguments.train)

    say(f"evaluating {model}")
    before = evaluate(stack, f"{name}-before", test, model, "question_answering", arguments.max_tokens)
    if arguments.generations:
        say(f"generating {arguments.generations} answers to each prompt")
        made = generate(stack, f"{name}-made", data, "sft", arguments.generations, arguments.max_tokens, model=model)
        data = made["dataset"]

    say(f"tuning {model} on {data}")
    request = tune.lora(
        f"{name}-tune", model, data, arguments.epochs, arguments.batch_size, rank=16, lr=1e-3, workers=arguments.workers
    )
    tuned = tune.train(stack, request, "supervised_fine_tune")

    say(f"evaluating {tuned['model']}")
    after = evaluate(stack, f"{name}-after", test, tuned["model"], "question_answering", arguments.max_tokens)
    differences = compare(stack, before["job_uuid"], after["job_uuid"])
    result = {"model": tuned["model"], "before": before["metrics"], "after": after["metrics"], "compared": differences}
    if arguments.ask:
        of_it = {"model": tuned["model"], "instructions": "", "sampling_params": {"strategy": "greedy"}}
        its_agent = agent.create(stack, of_it)
        result["turn"] = agent.turn(stack, its_agent, agent.open_session(stack, its_agent), arguments.ask)
    return result


def words(result: dict[str, Any]) -> str:
    lines = [f"{result['model']} is served"]
    for one in result["compared"]:
        before, after = result["before"][one["name"]], result["after"][one["name"]]
        lines.append(f"  {one['name']}: {before:.3f} → {after:.3f} ({one['low']:+.3f} to {one['high']:+.3f})")
    if "turn" in result:
        lines.append(f"  it says: {result['turn']['answer']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(drive(__doc__, options, run, words))
