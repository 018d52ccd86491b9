"""What the workers of a training do, one alone and several together, with a tiny model and without Ray."""

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
from stack.config import Config
from stack.context import Context
from tests.tiny_training import Ran, Trainings, example, save_model

# Two epochs of four steps, and a checkpoint in the middle of the second one.
TRAINING: dict[str, Any] = {"n_epochs": 2, "batch_size": 6, "checkpoint_iters": 6}
STOP, STEPS = 6, 8
ROWS = 24
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
            known[name] = trainings.run(name, kind, algorithm=algorithm, training=TRAINING | training, rows=ROWS)
        return known[name]

    return run


@pytest.mark.parametrize(
    ("kind", "algorithm", "training"),
    [
        ("sft", "full", {"micro_batch_size": 2}),
        ("sft", "lora", {"packing": True, "batch_size": 3}),
        ("sft", "full", {"workers": 2, "micro_batch_size": 1}),
        ("sft", "full", {"workers": 2, "parallelism": "fsdp"}),
        ("sft", "lora", {"workers": 2, "parallelism": "zero3"}),
        ("dpo", "full", {}),
        ("reward", "lora", {}),
    ],
    ids=str,
)
def test_a_training_that_goes_on_comes_to_the_losses_of_an_unbroken_one(
    trainings: Trainings, unbroken: Run, kind: Kind, algorithm: str, training: dict[str, Any]
) -> None:
    expected = unbroken(kind, algorithm, **training)
    name = "broken" + expected.folder.name.removeprefix("unbroken")
    options: dict[str, Any] = dict(algorithm=algorithm, training=TRAINING | training, rows=ROWS)
    broken = trainings.run(name, kind, **options, stop_after=STOP)
    assert len(broken.losses) == STOP
    after = trainings.run(name, kind, **options, go_on=True)
    assert f"going on from step {STOP}" in after.output
    assert len(after.losses) == STEPS
    assert after.losses == pytest.approx(expected.losses, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "algorithm", "training"),
    [
        ("sft", "full", {"micro_batch_size": 1}),
        ("sft", "full", {"parallelism": "fsdp"}),
        ("sft", "full", {"memory_efficient_fsdp_wrap": True}),
        ("sft", "full", {"parallelism": "zero1"}),
        ("sft", "full", {"parallelism": "zero2"}),
        ("sft", "full", {"parallelism": "zero3"}),
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


@pytest.mark.parametrize("optimizer_type", ["adam", "adamw", "sgd"])
def test_the_losses_are_those_of_a_plain_loop(trainings: Trainings, home: Path, optimizer_type: str) -> None:
    """With the optimizer, its weight decay, the way of its learning rate, and gradients of norm 1 at most."""
    optimizer = {"optimizer_type": optimizer_type, "lr": 0.02, "lr_min": 0.004, "weight_decay": 0.3}
    training = {"n_epochs": 2, "batch_size": 6, "shuffle": False}
    ran = trainings.run(f"plain-{optimizer_type}", optimizer=optimizer, training=training, rows=ROWS)
    rates = [rate_at(step, 8, 0.02, 0.004) for step in range(8)]
    assert ran.figures["learning_rate"] == pytest.approx(rates)
    assert ran.losses == pytest.approx(plain_losses(home / "model", optimizer_type, rates), abs=1e-4)


def rate_at(step: int, steps: int, lr: float, lr_min: float) -> float:
    """The learning rate rises in one step, and falls along a cosine."""
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * (step - 1) / (steps - 1))) / 2 if step else 0.0


def plain_losses(folder: Path, optimizer_type: str, rates: list[float]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer_type]
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = kind([{"params": decayed, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0.0}], lr=1)
    losses = []
    for step, rate in enumerate(rates):
        rows = [example("sft", number % ROWS) for number in range(6 * step, 6 * step + 6)]
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
        labels = torch.tensor([row["labels"] + [IGNORED] * (longest - len(row["labels"])) for row in rows])
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_activations_that_are_computed_again_change_no_loss(unbroken: Run) -> None:
    assert unbroken(enable_activation_checkpointing=True).losses == pytest.approx(unbroken().losses, abs=1e-5)


def test_a_worker_that_has_too_little_memory_says_what_to_lower(trainings: Trainings) -> None:
    training = {"batch_size": 4096, "micro_batch_size": 4096}
    ran = trainings.run("large", training=training, rows=4096, memory=100 * 2**20)
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
