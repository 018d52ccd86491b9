"""scripts/bench safety: its figures, and the stack that it measures."""

import json
from pathlib import Path

import httpx
import pytest
import yaml

from jobs.injection_scores import InjectionScores, SplitScores
from scripts import bench_safety
from scripts.bench_safety import SHIELDS, drawn, figures_of_shield, run, run_together, shares_of
from scripts.bench_servers import BenchFailed
from scripts.figures import Comparison
from scripts.local_stack import read_serve_file


def test_a_shield_is_compared_with_the_model_s_own_time() -> None:
    *measured, added = figures_of_shield([4, 5, 90], [8, 9, 10], [23, 24, 25], [9, 10, 11])
    assert [one.p50 for one in measured] == [5, 9, 24, 10]
    assert (added.p50, added.met) == (9, True)
    assert not figures_of_shield([4], [9], [24.5], [10])[-1].met


def test_the_scores_are_shares_with_the_targets_of_the_split_of_the_training_s_kind() -> None:
    scores = InjectionScores(
        {
            "s-labs-test": SplitScores(1_000, 400, accuracy=0.93, recall=0.9, false_positives=0.06),
            "neuralchemy-test": SplitScores(1_000, 500, accuracy=0.8, recall=0.7, false_positives=0.1),
        },
        wrong=[],
    )
    shares = {one.name: one for one in shares_of(scores, 0.65, 300)}
    assert shares["s-labs-test: told right"].met
    passed = shares["s-labs-test: harmless texts passed"]
    assert (passed.right, passed.of, passed.met) == (pytest.approx(564), 600, False)
    found = shares["neuralchemy-test: injections found"]
    assert (found.right, found.of, found.above) == (pytest.approx(350), 500, None)
    assert shares["neuralchemy-test: told right"].met, "it has no target"
    assert shares["reward model: held-out pairs told apart"].right == pytest.approx(195)
    assert not shares_of(scores, 0.6, 300)[-1].met


def replying(status: int = 200) -> httpx.Client:
    """A client of a gateway that answers for every shield."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)["shields"]
        return httpx.Response(status, json={"responses": [{"shield_type": one["shield_type"]} for one in asked]})

    return httpx.Client(base_url="http://stack", transport=httpx.MockTransport(answer))


def test_all_shields_together_are_compared_with_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {names: 0.01 * at for at, names in enumerate([*((one,) for one in SHIELDS), SHIELDS], 1)}
    clock = [0.0]

    def take(_: httpx.Client, names: list[str], text: str) -> None:
        clock[0] += seconds[tuple(names)]

    monkeypatch.setattr(bench_safety, "run", take)
    monkeypatch.setattr(bench_safety.time, "perf_counter", lambda: clock[0])
    *alone, together = run_together(replying())
    assert [one.p50 for one in alone] == pytest.approx([10, 20, 30, 40])
    assert isinstance(together, Comparison)
    assert (together.peer, together.ours, together.met) == (pytest.approx(40), pytest.approx(50), False)


def test_a_shield_that_does_not_answer_ends_the_bench() -> None:
    run(replying(), ["injection_shield"], "Hello")
    with pytest.raises(BenchFailed, match="503"):
        run(replying(503), ["injection_shield"], "Hello")


def test_the_stack_that_is_measured_can_be_served_and_has_the_shields(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(bench_safety.document(8_321)))
    config = read_serve_file(file).config
    assert {shield.id for shield in config.shields} | {"code_scanner_guard"} == set(SHIELDS)
    assert all(one.folder.is_dir() for one in config.classifiers)


def test_the_texts_are_the_same_at_every_run() -> None:
    assert drawn(3) == drawn(5)[:3]
    assert all(10 <= len(text.split()) <= 80 for text in drawn(50))
