"""The report of a benchmark: its scores with their intervals, by lm-eval's standard errors, how those of the examples
spread, and the worst of these."""

import heapq
import html
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from jobs.evaluation_report import SHOWN, WORST, histograms
from jobs.report import BLUE, ORANGE, row, svg, texts_row, write_page

# An interval of 95 % of a mean that is spread normally, in standard errors.
WIDTH = 1.96
_STDERR = "_stderr"
# Of how many scores histograms are drawn, and of how many tasks the worst examples are shown: some have hundreds.
MOST_DRAWN = 30
MOST_TASKS = 30
Score = tuple[str, float, float | None]


def write(file: Path, model: str, figures: dict[str, float], found: dict[str, Any]) -> None:
    """Writes the report of scores by `task/metric`, with their standard errors as `task/metric_stderr`; and of what
    lm-eval has found, which has the examples as `samples`."""
    scores = [(name, value, figures.get(_stderr_of(name))) for name, value in figures.items() if _STDERR not in name]
    heads = "".join(f"<th class=number>{head}</th>" for head in ("", "from", "to"))
    body = f"""<h1>Benchmark</h1>
<p class=note>model <code>{html.escape(model)}</code></p>
<h2>Scores</h2>
{_plot(scores)}
<table><tr><th></th>{heads}</tr>{"".join(row(_cells(*score)) for score in scores)}</table>
<p class=note>The ends are those of a 95 % interval, {WIDTH} of lm-eval's standard errors to each side, where it has
one. What was asked and answered stands in the files of samples.</p>
{_examples(found)}"""
    write_page(file, f"Benchmark of {model}", body)


def _stderr_of(name: str) -> str:
    """The name of a score's standard error, which stands before that of the filter of its answers."""
    metric, comma, filtered = name.partition(",")
    return f"{metric}{_STDERR}{comma}{filtered}"


def _cells(name: str, value: float, stderr: float | None) -> list[str]:
    ends = ["–", "–"] if stderr is None else [f"{value - WIDTH * stderr:.4g}", f"{value + WIDTH * stderr:.4g}"]
    return [name, f"{value:.4g}", *ends]


def _examples(found: dict[str, Any]) -> str:
    """How the scores of the examples spread, and the worst of each task by its first score that is a number."""
    examples = {task: _scored(task, samples) for task, samples in found.get("samples", {}).items()}
    spread = {name: [score for score, _ in of] for one in examples.values() for name, of in one.items()}
    if not spread:
        return ""
    worst = []
    for task, of in examples.items():
        for name, scored in list(of.items())[:1]:
            metric = name.removeprefix(f"{task}/").partition(",")[0]
            is_higher_better = found.get("higher_is_better", {}).get(task, {}).get(metric) is not False
            worst.append(_worst(name, scored, 1 if is_higher_better else -1))
    return f"""<h2>Scores of the examples</h2>
{histograms(dict(list(spread.items())[:MOST_DRAWN]))}
{_left_out("scores", len(spread), MOST_DRAWN)}
{"".join(worst[:MOST_TASKS])}
{_left_out("tasks", len(worst), MOST_TASKS)}"""


def _scored(task: str, samples: list[dict[str, Any]]) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """The examples of a task with their scores, by `task/metric`, where these are numbers."""
    scored: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for sample in samples:
        filtered = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            if isinstance(value := sample[metric], int | float | np.number | np.bool_) and np.isfinite(value):
                scored.setdefault(f"{task}/{metric}{filtered}", []).append((float(value), sample))
    return scored


def _worst(name: str, scored: list[tuple[float, dict[str, Any]]], sign: int) -> str:
    least = heapq.nsmallest(WORST, scored, key=lambda one: (sign * one[0], one[1]["doc_id"]))
    rows = "".join(texts_row(_texts(score, sample)) for score, sample in least)
    heads = "".join(f"<th>{head}</th>" for head in ("example", html.escape(name), "prompt", "target", "answer"))
    return f"<h2>Worst examples by {html.escape(name)}</h2>\n<table><tr>{heads}</tr>{rows}</table>"


def _texts(score: float, sample: dict[str, Any]) -> list[str]:
    """An example in a few words: the end of its prompt, before which others may stand, and of a choice what the
    likelihoods of all are."""
    prompt, answers = str(sample["arguments"][0][0]), ", ".join(map(str, sample["filtered_resps"]))
    end = prompt if len(prompt) <= SHOWN else f"…{prompt[1 - SHOWN :]}"
    return [str(sample["doc_id"]), f"{score:.4g}", end, _cut(str(sample["target"])), _cut(answers)]


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _left_out(what: str, count: int, most: int) -> str:
    return f"<p class=note>Of {count} {what} the first {most} are shown.</p>" if count > most else ""


def _plot(scores: list[Score]) -> str:
    """Those between 0 and 1, which most are."""
    drawn = [score for score in scores if 0 <= score[1] <= 1]
    if not drawn:
        return ""
    figure, axes = plt.subplots(figsize=(8, 0.6 * (len(drawn) + 1)))
    for place, (_, value, stderr) in enumerate(drawn):
        spread = WIDTH * (stderr or 0)
        axes.plot([value - spread, value + spread], [place, place], color=BLUE, linewidth=2)
        axes.plot([value], [place], "o", color=ORANGE)
    axes.set_yticks(range(len(drawn)), [name for name, _, _ in drawn])
    axes.set(ylim=(len(drawn) - 0.5, -0.5), xlim=(0, 1))
    return svg(figure)
