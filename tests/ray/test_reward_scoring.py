"""Reward models as Serve deployments: a judge on the real chat model, and one that a job has trained."""

import json
from typing import Any

import httpx
import pytest
from llama_stack import LlamaStack

from tests.running_stack import MODEL, Stack, ended, wait_for

PAIRS = [
    {"prompt": f"Is the {thing} ready?", "chosen": "Yes, it is.", "rejected": "Look for yourself, and leave me alone."}
    for thing in ("car", "soup", "room", "report", "garden", "letter", "bill", "table")
]
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False, "apply_lora_to_output": False,
    "rank": 8, "alpha": 16,
}  # fmt: skip
TRAINING = {"n_epochs": 1, "n_iters": 2, "batch_size": 4, "shuffle": True, "seed": 7}
START_S = 240


def generations(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "dialog": [{"role": "user", "content": pair["prompt"]}],
            "sampled_generations": [
                {"role": "assistant", "content": pair[name], "stop_reason": "end_of_turn", "tool_calls": []}
                for name in ("chosen", "rejected")
            ],
        }
        for pair in pairs
    ]


def test_the_model_that_comes_with_the_stack_starts_when_it_is_asked_and_scores_in_order(
    stack: Stack, client: httpx.Client
) -> None:
    asked = generations(PAIRS)
    with httpx.Client(base_url=stack.url, timeout=120) as http:
        rfc = LlamaStack(base_url=stack.url, http_client=http)
        answer = rfc.reward_scoring.score(model="reward-on-MiniLM", dialog_generations=asked)  # type: ignore[arg-type]
    scores = [[one.score for one in row.scored_generations] for row in answer.scored_generations]
    # It reads the answers alone, and these are the same in all dialogs.
    assert scores == [pytest.approx(scores[0], abs=1e-4)] * len(PAIRS)
    better, worse = max(scores[0]), min(scores[0])
    body = {"model": "reward-on-MiniLM", "dialog_generations": asked, "threshold": (better + worse) / 2}
    kept = client.post("/reward_scoring/score", json=body).json()["scored_generations"]
    assert [len(row["scored_generations"]) for row in kept] == [1] * len(PAIRS)


def test_a_judge_gives_the_same_rating_each_time_between_its_bounds(client: httpx.Client) -> None:
    body = {"model": "judge", "dialog_generations": generations(PAIRS)}
    first, second = (client.post("/reward_scoring/score", json=body) for _ in range(2))
    assert first.status_code == 200, first.text
    scores = [
        [
            one["score"]
            for reply in (first, second)
            for one in reply.json()["scored_generations"][row]["scored_generations"]
        ]
        for row in range(len(PAIRS))
    ]
    for one, other, again, other_again in scores:
        assert 1 <= one <= 5, "where 1 alone is among the likely tokens, it is 1"
        assert (one, other) == pytest.approx((again, other_again), abs=0.05)
    assert len({score for row in scores for score in row}) > 2, "they are means, not samples"


@pytest.fixture(scope="module")
def trained(stack: Stack) -> dict[str, Any]:
    """The status of a completed training of a reward model."""
    file = stack.home / "data" / "reward-pairs.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    pairs = {"columns": dict.fromkeys(("prompt", "chosen", "rejected"), "text"), "content_url": stack.data_at(file)}
    body = {
        "job_uuid": "scored", "model": MODEL, "dataset": pairs, "validation_dataset": pairs, "algorithm": "lora",
        "algorithm_config": LORA, "training_config": TRAINING,
        "optimizer_config": {"optimizer_type": "adamw", "lr": 1e-3, "lr_min": 0.0, "weight_decay": 0.0},
    }  # fmt: skip
    with stack.client() as client:
        client.post("/post_training/train_reward_model", json=body).raise_for_status()
        return ended(client, "post_training", "scored")


def test_a_trained_reward_model_scores_by_the_margin_that_its_training_has_measured(
    stack: Stack, client: httpx.Client, trained: dict[str, Any]
) -> None:
    assert trained["status"] == "completed", trained
    (checkpoint,) = trained["checkpoints"]
    model = checkpoint["model"]
    assert model == f"{MODEL}-scored"
    assert stack.files_at(checkpoint["path"]).is_dir()
    body = {"model": model, "dialog_generations": generations(PAIRS)}

    def scored() -> bool:
        reply = client.post("/reward_scoring/score", json=body)
        assert reply.status_code in (200, 503), reply.text
        return reply.status_code == 200

    wait_for(scored, START_S)
    with httpx.Client(base_url=stack.url, timeout=120) as http:
        rfc = LlamaStack(base_url=stack.url, http_client=http)
        answer = rfc.reward_scoring.score(model=model, dialog_generations=generations(PAIRS))  # type: ignore[arg-type]
    margins = [one.scored_generations[0].score - one.scored_generations[1].score for one in answer.scored_generations]
    assert sum(margins) / len(margins) == pytest.approx(trained["metrics"]["validation_preference_margin"], abs=0.02)

    chat = {"model": model, "messages": [{"role": "user", "content": "a"}]}
    reply = client.post("/v1/chat/completions", json=chat)
    assert (reply.status_code, MODEL in reply.json()["error"]["message"]) == (400, True)
    listed = {one["id"]: one for one in client.get("/models/list").json()["data"]}
    assert listed[model]["source"] == "trained"
    client.post("/models/remove", json={"model_id": model}).raise_for_status()
    wait_for(lambda: client.post("/reward_scoring/score", json=body).status_code == 404, 30)
