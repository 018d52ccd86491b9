"""The bench of trainings: its figures, what it trains, and the plain training beside it."""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.bench_servers import BenchFailed, local_model
from scripts.figures import Comparison, write_comparisons
from stack import post_training
from stack.api.post_training import PostTrainingSFTRequest
from stack.config import Config
from stack.context import Context
from tests import samples
from tests.conftest import CONFIG
from tests.samples import DIALOG
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs.training_worker import total_steps
    from scripts import bench_post_training as bench
    from scripts.bench_post_training import PARTS, Case, Training, cases, compared


def training(speed: float = 100, loss: float = 2.0, memory: float = 1_000, start: float | None = None) -> Training:
    """Three steps, of which the first takes a minute and the others have this speed."""
    return Training([5.0, 3.0, loss], [100, 300, 500], [60, 60 + 200 / speed, 60 + 400 / speed], [("a", memory)], start)


def not_met(rows: list[Comparison]) -> list[str]:
    return [row.name for row in rows if not row.met]


# Figures


def test_speed_is_that_of_the_tokens_behind_the_first_step() -> None:
    assert training(speed=50).tokens_per_second() == pytest.approx(50)
    assert training().tokens_per_step() == pytest.approx(500 / 3)
    assert Training([1.0], [1], [1], [("driver", 400), ("worker", 1_000)]).memory_mb() == 1_400


def test_a_job_is_to_be_as_fast_as_plain_trl_with_its_losses_and_its_memory() -> None:
    peer = [training()]
    assert not_met(bench.against_plain(peer, [training(speed=101, loss=2.01, memory=1_090)])) == []
    assert not_met(bench.against_plain(peer, [training(speed=99)])) == ["tokens a second"]
    assert not_met(bench.against_plain(peer, [training(memory=1_110)])) == ["peak memory"]
    for loss in (1.97, 2.03):
        assert not_met(bench.against_plain(peer, [training(loss=loss)])) == ["loss of the last step"]


def test_packing_is_to_gain_half_as_much_again() -> None:
    assert not_met(bench.against_padded([training()], [training(speed=151, loss=9, memory=9_999)])) == []
    assert not_met(bench.against_padded([training()], [training(speed=149)])) == ["tokens a second"]


def test_two_workers_are_to_learn_the_same_and_nearly_as_fast() -> None:
    assert not_met(bench.against_one_worker([training()], [training(speed=91, memory=9_999)])) == []
    two = [training(speed=89, loss=2.03)]
    assert not_met(bench.against_one_worker([training()], two)) == ["tokens a second", "loss of the last step"]


def test_of_several_runs_the_median_counts_and_the_slowest_start() -> None:
    runs = [training(speed=speed, start=start) for speed, start in ((1, 20), (100, 46), (900, 30))]
    (section,), figures = compared({"plain TRL": [training()], "ours": runs})
    speed = section.rows[0]
    assert (section.peer, section.ours) == ("plain TRL", "ours")
    assert (speed.name, speed.ours) == ("tokens a second", pytest.approx(100))
    assert (figures[0].p50, figures[0].met) == (46, False)
    assert compared({"plain TRL": [training()], "ours": runs[:1]})[1][0].met


def test_what_was_not_measured_is_not_compared() -> None:
    sections, figures = compared({name: [training()] for name in cases("packed", 5)})
    assert [one.title for one in sections] == ["Short texts, 44 a step, or a packed row"]
    assert [one.name for one in figures] == ["plain TRL, short: peak memory of a a", "ours, packed: peak memory of a a"]
    sections, _ = compared({name: [training()] for name in cases(None, 5)})
    assert len(sections) == len(PARTS)


def test_a_ratio_can_have_two_bounds() -> None:
    row = Comparison("loss", "", peer=2, ours=2.1, least=0.99, most=1.01)
    assert write_comparisons([row], "theirs", "ours").splitlines()[2:] == [
        "| loss | 2 | 2.1 | 1.05 | ≥ 0.99, ≤ 1.01 | MISSED |"
    ]


# What is trained


@pytest.fixture
def rows(home: Path) -> Path:
    """The data folder, with one short and one long row in all of their shapes."""
    long = [DIALOG[0], {"role": "user", "content": "x" * bench.SHORT_CHARACTERS}, DIALOG[2]]
    source = samples.write_rows(home / "rows.jsonl", [{"dialog": DIALOG}, {"dialog": long}])
    bench.write_rows(source, home / "data")
    return home / "data"


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_both_learn_the_same_rows(rows: Path) -> None:
    whole = [row["prompt"] + row["completion"] for row in read(rows / "completions.jsonl")]
    assert whole == [row["dialog"] for row in read(rows / "dialogs.jsonl")]
    assert [row["completion"] for row in read(rows / "completions.jsonl")] == [[DIALOG[2]]] * 2
    assert read(rows / "short.jsonl") == [{"text": DIALOG[1]["content"]}], "a long one counts as short"


@pytest.fixture
def small(home: Path, store_url: str) -> Iterator[Context]:
    """A context in which the model of the bench is a small one."""
    model = {"id": local_model().id, "path": "models/small", "context": 2_048, "adapter_rank": bench.RANK}
    config = Config.parse(CONFIG | {"store": store_url, "models": [model]}, "the tests' config")
    with closing(Context.open(config, engine=ScriptedEngine())) as context:
        yield context


@pytest.mark.parametrize("case", [case for case in cases(None, 7).values() if not bench.is_plain(case)])
def test_the_jobs_are_accepted_and_are_what_plain_trl_trains(rows: Path, small: Context, case: Case) -> None:
    request = PostTrainingSFTRequest.model_validate(bench.request_of(case, "run-1", rows))
    assert post_training.supervised_fine_tune(small, request).uuid == "run-1"
    peer = next(one for one in cases(None, 7).values() if bench.is_plain(one) and one.short == case.short)
    settings = bench.settings_of(peer, rows, rows)
    optimizer, config = request.optimizer_config, request.training_config
    assert (settings["lr"], settings["seed"], settings["steps"]) == (optimizer.lr, config.seed, config.n_iters)
    assert config.packing or settings["batch_size"] == config.batch_size
    assert total_steps(request, examples=9) == settings["steps"]
    assert config.checkpoint_iters > config.n_iters, "it saves in between, as plain TRL does not"


def test_there_are_as_few_trainings_as_can_be() -> None:
    assert [*cases("plain", 5)] == ["plain TRL", "ours"]
    assert [*cases("workers", 5)] == ["ours", "ours, two workers"]
    assert len(cases(None, 5)) == 5, "the one that two parts compare with is trained twice"


# What is measured


def test_what_a_job_has_recorded_is_what_was_measured(context: Context) -> None:
    submitted = time.time() - 30
    samples.add_job(context.store, "run-1", "supervised_fine_tune")
    samples.start(context.store, "run-1")
    steps = [(1, 4.0, 100, 2.5), (2, 3.0, 250, 5.0)]
    values = [
        (name, step, float(value))
        for step, *of_step in steps
        for name, value in zip(("loss", "tokens", "seconds"), of_step, strict=True)
    ]
    samples.report(
        context.store, "run-1", {"done": 2, "unit": "steps"}, [*values, ("memory_gb", 1, 2.0), ("seconds", 2, 9.0)]
    )
    found = bench.training_of(context, "run-1", submitted)
    assert (found.loss, found.tokens, found.seconds) == ([4, 3], [100, 250], [2.5, 5])
    assert found.tokens_per_second() == 60
    assert found.start_s is not None
    assert 29 < found.start_s < 60


@pytest.mark.parametrize("recorded", [[], [("loss", 1, 4.0), ("seconds", 1, 2.0)]])
def test_a_job_without_its_steps_is_not_measured(context: Context, recorded: list[tuple[str, int, float]]) -> None:
    samples.add_job(context.store, "run-1", "supervised_fine_tune")
    samples.start(context.store, "run-1")
    samples.report(context.store, "run-1", {"done": 2, "unit": "steps"}, recorded)
    for job_uuid in ("run-1", "nobody"):
        with pytest.raises(BenchFailed, match=f"the job '{job_uuid}' has not recorded its loss, tokens and seconds"):
            bench.training_of(context, job_uuid, 0.0)


# A process that has had much memory, and says so, until its input ends; its title is its argument, if it has one.
GREEDY = """
import sys
import setproctitle
if sys.argv[1:]:
    setproctitle.setproctitle(sys.argv[1])
block = bytearray(100_000_000)
del block
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def waiting(folder: Path, *command: str) -> Iterator[psutil.Process]:
    """A process that has started, until the end."""
    with subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield psutil.Process(process.pid)
        process.communicate()


@pytest.mark.parametrize(
    ("title", "part"),
    [
        ("ray::RayTrainWorker", bench.WORKER),
        ("ray::TrainController.run", bench.CONTROLLER),
        ("ray::IDLE", None),
        ("ray job submit -- python -m jobs.supervised_fine_tune", None),
    ],
)
def test_an_actor_is_known_by_its_title(tmp_path: Path, title: str, part: str | None) -> None:
    with waiting(tmp_path, "-c", GREEDY, title) as process:
        assert bench.part_of(process) == part


def test_the_peak_of_each_process_of_a_training_is_kept(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "supervised_fine_tune.py").write_text(GREEDY)
    with bench.Peaks() as peaks:
        with waiting(tmp_path, "-m", "jobs.supervised_fine_tune"), waiting(tmp_path, "-c", GREEDY, "ray::IDLE"):
            peaks.look()
        peaks.look()  # they have ended
    ((part, peak),) = peaks.by_process()
    assert part == bench.DRIVER
    assert 95 < peak < 150


def test_a_training_that_fails_is_named_with_its_last_words(rows: Path, tmp_path: Path) -> None:
    case = Case("ours", short=False, batch_size=8, steps=5)
    with pytest.raises(BenchFailed, match="ours failed: no memory"):
        bench.finish(case, [sys.executable, "-c", "print('no memory'); raise SystemExit(1)"], tmp_path)


# Plain TRL


def save_model(folder: Path) -> None:
    """A model of two small layers, and a tokenizer of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<eos>",
        "user",
        "system",
        "assistant",
        *["You", "are", "brief", ".", "What", "is", "the", "capital", "of", "France", "?", "Paris"],
    ]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)).save_pretrained(folder)


def test_plain_trl_is_measured_at_each_step(rows: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    case = Case("plain TRL", short=False, batch_size=2, steps=3)
    settings = bench.settings_of(case, rows, tmp_path / "trainer") | {"model": str(tmp_path / "model")}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command = ["-m", "scripts.plain_trl", str(tmp_path / "settings.json"), str(tmp_path / "steps.json")]
    peaks = bench.finish(case, [sys.executable, *command], tmp_path)
    found = Training(**json.loads((tmp_path / "steps.json").read_text()), peak_mb=peaks)
    assert [part for part, _ in peaks] == [bench.SCRIPT]
    assert found.memory_mb() > 100
    assert found.tokens == [24, 48, 72], "of the rows, 15 and 9, without what fills up the shorter one"
    assert len(found.loss) == 3
    assert all(0 < loss < 10 for loss in found.loss)
    assert found.seconds == sorted(found.seconds)
    assert found.tokens_per_second() > 0
