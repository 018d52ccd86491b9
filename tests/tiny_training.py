"""Trainings of a tiny model by what the workers of Ray Train do, in Ray Train's local mode: without Ray, in a second.

Each worker is a process of its own, forked from one that has imported the libraries already, which takes them longer
than a training. Several are told of each other as torchrun does it, and talk by gloo.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import warnings
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow

from stack.api.post_training import PostTrainingRLHFRequest, PostTrainingSFTRequest, RewardModelRequest
from stack.context import Context
from stack.store import Job
from tests import samples
from tests.running_stack import free_port
from tests.unit.test_training_data import CHATML, save_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs.training_data import COLUMNS, IGNORED, Kind
    from jobs.training_worker import MADE, Settings

REQUESTS = {"sft": PostTrainingSFTRequest, "dpo": PostTrainingRLHFRequest, "reward": RewardModelRequest}
BODIES = {
    "sft": samples.fine_tuning, "dpo": samples.preference_optimization, "reward": samples.reward_training,
}  # fmt: skip
ATTENTION = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True}
IMPORTED = ["trl", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer", "peft",
            "deepspeed", "transformers.models.llama.modeling_llama", "jobs.training_worker", "ray.train.torch",
            "tests.tiny_training"]  # fmt: skip
RUN_S = 90


@dataclass(frozen=True)
class Ran:
    """What a training has left: its figures by name and step, what it saved by step, and how its workers ended."""

    figures: dict[str, list[float]]
    folder: Path
    exit_codes: list[int | None]
    output: str

    @property
    def losses(self) -> list[float]:
        return self.figures["loss"]

    @property
    def made(self) -> Path:
        return self.folder / "temporary" / "final" / MADE

    def saved(self, step: int) -> Path:
        """The checkpoint of a step, as Ray Train would keep it."""
        return self.folder / "kept" / f"step-{step}"


def save_model(folder: Path, poison: int | None = None) -> Path:
    """A Llama of 2 layers with random weights, always the same, and its tokenizer.

    Where a token is the `poison`, every number becomes none.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    save_tokenizer(folder, CHATML)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape, **special)
    model = LlamaForCausalLM(config)
    if poison is not None:
        model.get_input_embeddings().weight.data[poison] = torch.inf
    model.save_pretrained(folder)
    return folder


class Trainings:
    """Runs trainings of a model, each the job of its name. The environment has ON_CPU."""

    def __init__(self, context: Context, model: Path, folder: Path) -> None:
        self._context = context
        self._model = model
        self._folder = folder
        self._processes: ForkServerContext = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(IMPORTED)

    def run(
        self,
        name: str,
        kind: Kind = "sft",
        *,
        training: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        algorithm: str = "full",
        lora: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        adapter: Path | None = None,
        rows: int = 24,
        validation: int = 0,
        stop_after: int | None = None,
        go_on: bool = False,
        memory: int | None = None,
        model: Path | None = None,
        fails: bool = False,
    ) -> Ran:
        """Trains, with changes of the request's fields: `lora` are those of the new adapter, `loss` those of DPO's.

        An `adapter` is trained on. There are so many `rows`, and so many of `validation`.
        `stop_after` a checkpoint of that step the workers are killed; with `go_on` the job of the name is another
        attempt at what was stopped so. With `memory` workers have at most so many bytes of memory more than they start
        with.
        """
        folder = self._folder / name
        attempt = 2 if go_on else 1
        request = _request(kind, name, training or {}, optimizer or {}, algorithm, lora or {}, loss or {})
        job = self._job(name, request.model_dump(mode="json"), attempt)
        shutil.rmtree(folder / "temporary", ignore_errors=True)
        (folder / "temporary").mkdir(parents=True)
        train = write_examples(folder / "train.arrow", kind, rows, packed=request.training_config.packing)
        settings = Settings(
            config=self._context.config.model_dump(mode="json"),
            tenant="default",
            attempt=attempt,
            kind=kind,
            request=request.model_dump(mode="json"),
            model=str(model or self._model),
            adapter=str(adapter) if adapter else None,
            train=str(train),
            examples=rows // 2 if request.training_config.packing else rows,
            validation=str(write_examples(folder / "validation.arrow", kind, validation)) if validation else None,
            temporary=str(folder / "temporary"),
            tensorboard=str(folder / "tensorboard"),
        )
        exit_codes, output = self._work(settings, folder, stop_after, go_on, memory)
        found = self._context.store.telemetry.metrics("default", job.run_id)
        names = {metric.name for metric in found}
        figures = {name: [float(one.value) for one in found if one.name == name] for name in names}  # type: ignore[arg-type]
        ran = Ran(figures, folder, exit_codes, output)
        expected = -signal.SIGKILL if stop_after else 1 if fails or memory else 0
        assert set(exit_codes) == {expected}, output
        return ran

    def _job(self, name: str, request: dict[str, Any], attempt: int) -> Job:
        store = self._context.store
        if attempt == 1:
            job = samples.add_job(store, name, "supervised_fine_tune", **request)
            samples.start(store, name)
            return job
        job = store.jobs.get("default", name)  # type: ignore[assignment]
        assert store.jobs.lose_attempt(job.id, attempt - 1, "killed")
        assert store.jobs.open_attempt(job.id, attempt, f"default.{name}.{attempt}")
        assert store.jobs.begin(job.id, attempt, {})
        return job

    def _work(
        self, settings: Settings, folder: Path, stop_after: int | None, go_on: bool, memory: int | None
    ) -> tuple[list[int | None], str]:
        workers, port = settings.request["training_config"]["workers"], free_port()
        log = folder / "log.txt"
        processes: list[ForkServerProcess] = []
        for rank in range(workers):
            told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=workers, LOCAL_WORLD_SIZE=workers)
            told |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            environment = {name: str(value) for name, value in told.items()}
            environment["STACK_HOME"] = os.environ["STACK_HOME"]
            given = (environment, log, asdict(settings), folder / "kept", stop_after, go_on, memory)
            processes.append(self._processes.Process(target=_worker, args=given, daemon=True))
            processes[-1].start()
        for process in processes:
            process.join(RUN_S)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in processes], log.read_text()


def _request(
    kind: Kind,
    name: str,
    training: dict[str, Any],
    optimizer: dict[str, Any],
    algorithm: str,
    lora: dict[str, Any],
    loss: dict[str, Any],
) -> Any:
    body = BODIES[kind]("data", job_uuid=name)
    body["training_config"] |= {"seed": 3} | training
    body["optimizer_config"] |= {"lr": 0.003} | optimizer
    made = samples.lora(**ATTENTION | lora) if algorithm != "full" else None
    if kind == "dpo":
        body["lora_config"] = made
        body["algorithm_config"] |= loss
    else:
        body |= {"algorithm": algorithm, "algorithm_config": made}
    return REQUESTS[kind].model_validate(body)


def write_examples(file: Path, kind: Kind, rows: int, *, packed: bool = False) -> Path:
    """Examples of several lengths, all different; packed, each row has two of them."""
    columns = [*COLUMNS[kind], *(["seq_lengths"] if packed else [])]
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in columns])
    examples = [example(kind, number) for number in range(rows)]
    if packed:
        pairs = zip(examples[::2], examples[1::2], strict=True)
        examples = [
            {name: one[name] + other[name] for name in COLUMNS[kind]}
            | {"seq_lengths": [len(one["input_ids"]), len(other["input_ids"])]}
            for one, other in pairs
        ]
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(examples, schema))
    return file


def example(kind: Kind, number: int) -> dict[str, list[int]]:
    """The example of a number: tokens, as data that is prepared has them."""
    length = 6 + number % 5
    tokens = [5 + (number * 7 + place * (3 + number % 4)) % 200 for place in range(length)]
    if kind == "sft":
        return {"input_ids": tokens, "labels": [IGNORED, IGNORED, *tokens[2:]]}
    prompt, chosen, rejected = tokens[:3], tokens[3:], [token + 1 for token in tokens[4:]]
    if kind == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}


def _worker(
    environment: dict[str, str],
    log: Path,
    told: dict[str, Any],
    kept: Path,
    stop_after: int | None,
    go_on: bool,
    memory: int | None,
) -> None:
    """What one process does: it is the worker of its rank."""
    import psutil
    import ray.train
    from ray.train import Checkpoint, ScalingConfig
    from ray.train.torch import TorchTrainer

    from jobs.training_worker import train_on_worker

    os.environ |= environment
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)

    def keep(metrics: dict[str, Any], checkpoint: Checkpoint | None = None) -> None:
        """What Ray Train does with a report: the local mode only remembers the last."""
        step = metrics["steps"]
        if checkpoint is not None and not (Path(checkpoint.path) / MADE).is_dir():
            shutil.copytree(checkpoint.path, kept / f"step-{step}")
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def train(told: dict[str, Any]) -> None:
        if go_on:
            last = max(kept.iterdir(), key=lambda folder: int(folder.name.removeprefix("step-")))
            ray.train.report({}, checkpoint=Checkpoint(str(last)))  # which a training finds then
        ray.train.report = keep
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory,) * 2)
        train_on_worker(told)

    TorchTrainer(train, train_loop_config=told, scaling_config=ScalingConfig(num_workers=0)).fit()
