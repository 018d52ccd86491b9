"""What the workers of a training do, one alone and several together, with a tiny model and without Ray."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import WorkerGroupError
from safetensors.torch import load_file

from jobs import driver
from jobs.trainer import ON_CPU
from jobs.training_data import IGNORED, Kind
from jobs.training_worker import algorithm_of, loading
from stack.config import Config
from stack.context import Context
from tests.tiny_training import Ran, Trainings, example, save_model
from tests.unit.test_post_training import dpo, reward_model, sft

# Two epochs of four steps, and a checkpoint in the middle of the second one.
TRAINING: dict[str, Any] = {"n_epochs": 2, "batch_size": 6, "checkpoint_iters": 6}
STOP, STEPS = 6, 8
ROWS = 24
PAIR = ("chosen", "rejected")
Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trainings(home: Path) -> Iterator[Trainings]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STACK_HOME": str(home), **ON_CPU}.items():
            patch.setenv(name, value)
        config = Config.parse({"models": [{"id": "small", "path": "model"}]}, "the tests' config")
        context = Context.open(config)
        yield Trainings(context, save_model(home / "model"), home / "trainings")
        context.close()


@pytest.fixture(scope="module")
def unbroken(trainings: Trainings) -> Run:
    """Runs a training from its beginning to its end, once for all tests."""
    known: dict[str, Ran] = {}

    def run(kind: Kind = "sft", algorithm: str = "full", **training: Any) -> Ran:
        name = f"unbroken-{kind}-{algorithm}-" + "-".join(f"{key}-{value}" for key, value in training.items())
        if name not in known:
            known[name] = trainings.run(name, kind, **options(run, algorithm, training))
        return known[name]

    return run


def options(unbroken: Run, algorithm: str, training: dict[str, Any]) -> dict[str, Any]:
    """What the tests have in common. The algorithm "adapter" trains on one that another training has made."""
    common = dict(training=TRAINING | training, rows=ROWS)
    if algorithm == "adapter":
        return common | {"adapter": unbroken("sft", "lora").made}
    return common | {"algorithm": algorithm}


@pytest.mark.parametrize(
    ("kind", "algorithm", "training"),
    [
        ("sft", "full", {"micro_batch_size": 2}),
        ("sft", "lora", {"packing": True, "batch_size": 3}),
        ("sft", "full", {"workers": 2, "micro_batch_size": 1}),
        ("sft", "full", {"workers": 2, "parallelism": "fsdp"}),
        ("sft", "lora", {"workers": 2, "parallelism": "zero3"}),
        ("dpo", "full", {}),
        ("dpo", "adapter", {}),
        ("dpo", "adapter", {"workers": 2}),
        ("dpo", "adapter", {"workers": 2, "parallelism": "fsdp"}),
        ("dpo", "adapter", {"workers": 2, "parallelism": "zero3"}),
        ("reward", "lora", {}),
    ],
    ids=str,
)
def test_a_training_that_goes_on_comes_to_the_losses_of_an_unbroken_one(
    trainings: Trainings, unbroken: Run, kind: Kind, algorithm: str, training: dict[str, Any]
) -> None:
    expected = unbroken(kind, algorithm, **training)
    name = "broken" + expected.folder.name.removeprefix("unbroken")
    same = options(unbroken, algorithm, training)
    broken = trainings.run(name, kind, **same, stop_after=STOP)
    assert len(broken.losses) == STOP
    after = trainings.run(name, kind, **same, go_on=True)
    assert f"going on from step {STOP}" in after.output
    assert len(after.losses) == STEPS
    assert after.losses == pytest.approx(expected.losses, abs=1e-4)
    assert after.figures["tokens"] == expected.figures["tokens"]
    assert after.figures["seconds"] == sorted(after.figures["seconds"])
    rates = [tokens / s for tokens, s in zip(after.figures["tokens"], after.figures["seconds"], strict=True)]
    assert after.figures["tokens_per_second"] == pytest.approx(rates)


@pytest.mark.parametrize("algorithm", ["full", "lora", "adapter"])
def test_what_is_preferred_is_learned_from_a_policy_that_is_its_reference(unbroken: Run, algorithm: str) -> None:
    losses = unbroken("dpo", algorithm).losses
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "algorithm", "training"),
    [
        ("sft", "full", {"micro_batch_size": 1}),
        ("sft", "full", {"parallelism": "fsdp"}),
        ("sft", "full", {"parallelism": "fsdp", "micro_batch_size": 1}),
        ("sft", "full", {"memory_efficient_fsdp_wrap": True}),
        ("sft", "full", {"parallelism": "zero1"}),
        ("sft", "full", {"parallelism": "zero2"}),
        ("sft", "full", {"parallelism": "zero2", "micro_batch_size": 1}),
        ("sft", "full", {"parallelism": "zero3"}),
        ("sft", "full", {"parallelism": "zero3", "micro_batch_size": 1}),
        ("sft", "lora", {"parallelism": "zero3"}),
        ("dpo", "full", {"parallelism": "zero2"}),
        ("reward", "full", {"parallelism": "fsdp"}),
    ],
    ids=str,
)
def test_two_workers_come_to_the_losses_and_the_weights_of_one(
    unbroken: Run, kind: Kind, algorithm: str, training: dict[str, Any]
) -> None:
    one, two = unbroken(kind, algorithm), unbroken(kind, algorithm, workers=2, **training)
    assert one.losses[0] > one.losses[-1]
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    expected, found = weights(one.made, kind), weights(two.made, kind)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-3, rtol=1e-3)


def weights(made: Path, kind: Kind) -> dict[str, Any]:
    """Those that a training has made, as transformers or peft would load them."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if (made / "adapter_model.safetensors").is_file():
        found: dict[str, Any] = load_file(made / "adapter_model.safetensors")
        return found
    kind_of_model = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    model, told = kind_of_model.from_pretrained(made, output_loading_info=True)
    assert not any(told.values()), told
    return dict(model.state_dict())


@pytest.mark.parametrize("parallelism", ["zero1", "zero2", "zero3"])
def test_each_worker_saves_its_own_share_of_the_optimizers_state(unbroken: Run, parallelism: str) -> None:
    saved = unbroken(workers=2, parallelism=parallelism).saved(STOP) / f"global_step{STOP}"
    assert len(list(saved.glob("*_optim_states.pt"))) == 2


@pytest.mark.parametrize(("kind", "rows"), [("sft", 25), ("sft", 1), ("dpo", 25), ("dpo", 27), ("reward", 27)], ids=str)
def test_epochs_that_end_within_a_step_are_the_same_whoever_shares_the_steps(
    trainings: Trainings, kind: Kind, rows: int
) -> None:
    steps = 2 * -(-rows // 6)
    shared = [{"micro_batch_size": 6}, {"micro_batch_size": 2}, {"workers": 2, "micro_batch_size": 1}]
    ran = [
        trainings.run(f"rest-{kind}-{rows}-{n}", kind, training={"n_epochs": 2, "batch_size": 6} | one, rows=rows)
        for n, one in enumerate(shared)
    ]
    assert len(ran[0].losses) == steps
    for one in ran[1:]:
        assert one.losses == pytest.approx(ran[0].losses, abs=1e-4)
        assert one.figures["tokens"] == ran[0].figures["tokens"]


@pytest.mark.parametrize(("optimizer_type", "epochs"), [("adam", 2), ("adamw", 2), ("sgd", 2), ("adamw", 15)])
def test_the_losses_are_those_of_a_plain_loop(
    trainings: Trainings, home: Path, optimizer_type: str, epochs: int
) -> None:
    """With the optimizer, its weight decay, the way of its learning rate, and gradients of norm 1 at most."""
    steps = 4 * epochs
    optimizer = {"optimizer_type": optimizer_type, "lr": 0.02, "lr_min": 0.004, "weight_decay": 0.3}
    training = {"n_epochs": epochs, "batch_size": 6, "shuffle": False}
    ran = trainings.run(f"plain-{optimizer_type}-{epochs}", optimizer=optimizer, training=training, rows=ROWS)
    rates = [rate_at(step, steps, 0.02, 0.004) for step in range(steps)]
    assert ran.figures["learning_rate"] == pytest.approx(rates)
    scheduler = torch.load(ran.saved(steps) / "scheduler.pt", weights_only=True)
    assert scheduler["_last_lr"] == pytest.approx([0.004, 0.004]), "of the weights that decay, and of the others"
    # In many steps small differences grow.
    assert ran.losses[:8] == pytest.approx(plain_losses(home / "model", optimizer_type, rates[:8]), abs=1e-4)


def rate_at(step: int, steps: int, lr: float, lr_min: float) -> float:
    """The learning rate rises in 3 % of the steps, which may be none, and falls along a cosine."""
    warm_up = round(0.03 * steps)
    if step < warm_up:
        return lr * step / warm_up
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def plain_losses(folder: Path, optimizer_type: str, rates: list[float]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer_type]
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = kind([{"params": decayed, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0.0}], lr=1)
    losses = []
    for step, rate in enumerate(rates):
        loss = plain_loss(model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def plain_loss(model: Any, step: int) -> Any:
    """The loss of a step of six examples, which are not shuffled."""
    rows = [example("sft", number % ROWS) for number in range(6 * step, 6 * step + 6)]
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [IGNORED] * (longest - len(row["labels"])) for row in rows])
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def test_a_training_of_one_step_learns(trainings: Trainings, home: Path) -> None:
    ran = trainings.run("one-step", training=TRAINING | {"n_iters": 1})
    assert ran.figures["learning_rate"] == [0.003]
    before, after = weights(home / "model", "sft"), weights(ran.made, "sft")
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("algorithm", "loss"),
    [
        ("full", {"beta": 0.1}),
        ("full", {"beta": 0.1, "reward_scale": 3.0}),
        ("full", {"beta": 0.5, "epsilon": 0.2}),
        ("full", {"beta": 0.5, "gamma": 0.4}),
        ("lora", {"beta": 0.2, "reward_scale": 2.0, "epsilon": 0.1, "gamma": 0.2}),
        ("adapter", {"beta": 0.2, "reward_scale": 2.0, "epsilon": 0.1, "gamma": 0.2}),
    ],
    ids=str,
)
def test_the_loss_of_preferences_is_the_published_one(
    trainings: Trainings, unbroken: Run, home: Path, algorithm: str, loss: dict[str, float]
) -> None:
    """Of the second step, in which the policy is no longer the reference."""
    training = {"shuffle": False, "micro_batch_size": 6, "checkpoint_iters": 1, "n_iters": 2}
    name = f"published-{algorithm}-" + "-".join(loss)
    ran = trainings.run(name, "dpo", **options(unbroken, algorithm, training), loss=loss)
    reference = unbroken("sft", "lora").made if algorithm == "adapter" else None
    policies = [language_model(home, ran.saved(1)), language_model(home, reference)]
    assert ran.losses[1] == pytest.approx(published_loss(*policies, **loss), abs=1e-5)


def language_model(home: Path, folder: Path | None) -> Any:
    """The tests' model, or what a training has made of it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    is_whole = folder is not None and not (folder / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder if is_whole else home / "model")
    return model if folder is None or is_whole else PeftModel.from_pretrained(model, folder)


def published_loss(
    policy: Any, reference: Any, *, beta: float, reward_scale: float = 1, epsilon: float = 0, gamma: float = 0
) -> float:
    """DPO's (arXiv 2305.18290, equation 7), robust (2403.00409, equation 13), with likelihood (2407.21783, 4.1.4)."""
    rewards: list[Any] = []
    likelihoods: list[float] = []
    for row in (example("dpo", number) for number in range(6, 12)):
        chosen, rejected = (log_probabilities(policy, row["prompt_ids"], row[f"{one}_ids"]) for one in PAIR)
        before = [log_probabilities(reference, row["prompt_ids"], row[f"{one}_ids"]).sum() for one in PAIR]
        rewards.append(beta * reward_scale * (chosen.sum() - before[0] - rejected.sum() + before[1]))
        likelihoods.extend(chosen.tolist())
    right = torch.stack(rewards).sigmoid().log()
    wrong = (-torch.stack(rewards)).sigmoid().log()
    preference = -((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon)
    return float(preference.mean()) - gamma * sum(likelihoods) / len(likelihoods)


def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> Any:
    """Those of each token of an answer."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(answer)), answer]


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
def test_an_adapter_has_the_rank_the_scale_and_the_layers_that_are_asked_for(
    trainings: Trainings, home: Path, algorithm: str
) -> None:
    lora = {"rank": 4, "alpha": 12, "lora_attn_modules": ["k_proj", "o_proj"]}
    training = {"batch_size": 6, "shuffle": False, "checkpoint_iters": 1, "n_iters": 2}
    ran = trainings.run(f"adapter-{algorithm}", algorithm=algorithm, lora=lora, training=training)
    config = json.loads((ran.made / "adapter_config.json").read_text())
    layers = {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 12, layers)
    model, adapter = language_model(home, None), weights(ran.saved(1), "sft")
    changed = set()
    for name, weight in model.named_parameters():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in adapter:
            found = weight.data + 12 / 4 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            if algorithm == "dora":  # arXiv 2402.09353, equation 5
                found *= (adapter[f"{key}.lora_magnitude_vector"] / found.norm(dim=1))[:, None]
            weight.data = found
            changed.add(name.split(".")[-2])
    assert changed == layers
    assert ran.losses[1] == pytest.approx(plain_loss(model, 1).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("request_of", "changes", "adapter", "dtype"),
    [
        (sft, {"algorithm": "full", "algorithm_config": None}, None, torch.float32),
        (sft, {"algorithm": "lora"}, None, torch.bfloat16),
        (sft, {"algorithm": "dora"}, None, torch.bfloat16),
        (reward_model, {"algorithm": "full", "algorithm_config": None}, None, torch.float32),
        (reward_model, {"algorithm": "lora"}, None, torch.bfloat16),
        (dpo, {"lora_config": None}, None, torch.float32),
        (dpo, {}, None, torch.bfloat16),
        (dpo, {"lora_config": None}, "an-adapter", torch.bfloat16),
    ],
)
def test_weights_that_are_trained_are_not_rounded_on_gpus(
    monkeypatch: pytest.MonkeyPatch, request_of: Any, changes: dict[str, Any], adapter: str | None, dtype: Any
) -> None:
    algorithm = algorithm_of(request_of("data", **changes), adapter)
    assert loading(algorithm)["dtype"] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading(algorithm)["dtype"] == dtype


def test_activations_that_are_computed_again_change_no_loss(unbroken: Run) -> None:
    assert unbroken(enable_activation_checkpointing=True).losses == pytest.approx(unbroken().losses, abs=1e-5)


def test_a_worker_that_has_too_little_memory_says_what_to_lower(trainings: Trainings) -> None:
    training = {"batch_size": 4096, "micro_batch_size": 4096}
    # Room for the threads that libraries start, but not for the logits, which take several times that.
    ran = trainings.run("large", training=training, rows=4096, memory=2**30)
    reason = driver.reason(WorkerGroupError("a worker failed", {0: Exception(ran.output)}))
    assert reason.startswith("out of memory: lower micro_batch_size, batch_size or max_length in training_config: ")
    assert "allocate" in reason


def test_a_loss_that_is_no_number_ends_the_training_before_anything_of_it_is_saved(
    home: Path, trainings: Trainings
) -> None:
    poisoned = save_model(home / "poisoned", poison=example("sft", 20)["input_ids"][-2])
    training = TRAINING | {"shuffle": False, "checkpoint_iters": 1}
    ran = trainings.run("diverging", training=training, model=poisoned, fails=True)
    assert "stack.errors.Diverged: the loss is nan at step 4: lower the learning rate" in ran.output
    assert len(ran.losses) == 3
    assert sorted(saved.name for saved in ran.saved(3).parent.iterdir()) == ["step-1", "step-2", "step-3"]
    assert all(weight.isfinite().all() for name, weight in weights(ran.saved(3), "sft").items() if "embed" not in name)


def test_a_validation_loss_that_is_no_number_ends_the_training_before_it_is_a_score(
    home: Path, trainings: Trainings
) -> None:
    poisoned = save_model(home / "poisoned-validation", poison=example("sft", 20)["input_ids"][-2])
    training = TRAINING | {"checkpoint_iters": 2}
    ran = trainings.run("invalid", training=training, rows=18, validation=24, model=poisoned, fails=True)
    assert "stack.errors.Diverged: the validation_loss is nan at step 2: lower the learning rate" in ran.output
    assert len(ran.losses) == 2
    assert not (ran.folder / "kept").exists()


def test_a_worker_that_does_not_find_the_files_says_what_nodes_must_share(home: Path, trainings: Trainings) -> None:
    ran = trainings.run("astray", model=home / "nowhere", fails=True)
    assert f"{home}/nowhere is not on this node: STACK_HOME must be a folder that all nodes share" in ran.output
