"""The report of an evaluation: its scores with their intervals, how those of the examples spread, the worst of these,
and what it has cost."""

import heapq
import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from jobs.evaluation_results import Summary
from jobs.report import BLUE, ORANGE, row, svg, texts_row, write_page
from jobs.row_log import lines_of
from stack.intervals import Estimate, aggregate

# How many of the worst examples are shown, and of those that failed; and how much of each text.
WORST = 10
SHOWN = 600
# A histogram is of at most so many examples, drawn evenly from all.
DRAWN = 100_000
# What is on another scale than from 0 to 1.
_OTHER_SCALES = ("bleu", "perplexity", "rating")


@dataclass(frozen=True)
class Shown:
    """What a report shows of the examples: by metric their scores and the worst of them, and some that failed."""

    scores: dict[str, list[float]]
    worst: dict[str, list[dict[str, Any]]]
    failed: list[dict[str, Any]]


def write(file: Path, examples: Path, summary: Summary) -> None:
    """Writes the report of the examples in a file of JSON Lines."""
    shown = _shown(examples, summary)
    body = f"""<h1>Evaluation: {html.escape(summary.task.replace("_", " "))}</h1>
<p class=note>model <code>{html.escape(summary.model)}</code> · {summary.examples} examples · content of the data set
<code>{html.escape(summary.dataset_sha256[:16])}…</code></p>
<h2>Scores</h2>
{_scores(summary)}
<h2>Scores of the examples</h2>
{histograms(shown.scores)}
<h2>Cost</h2>
<table>{"".join(row(cells) for cells in cost_rows(summary))}</table>
{"".join(_worst(name, worst) for name, worst in shown.worst.items())}
{_failed(summary, shown.failed)}"""
    write_page(file, f"Evaluation of {summary.model}", body)


def score_rows(summary: Summary) -> list[tuple[str, str, str, str, str]]:
    """(name, value, ends of the interval, number of examples) of every score."""
    return [
        (name, _number(one.value), _number(one.low), _number(one.high), str(one.examples))
        for name, one in summary.estimates.items()
    ]


def cost_rows(summary: Summary) -> list[tuple[str, str]]:
    """(label, value) of what the evaluation has taken."""
    tokens = summary.prompt_tokens + summary.completion_tokens
    return [
        ("prompt tokens", f"{summary.prompt_tokens}"),
        ("completion tokens", f"{summary.completion_tokens}"),
        ("time", f"{summary.seconds:.1f} s"),
        ("speed", f"{tokens / summary.seconds:.0f} tokens/s" if summary.seconds else "–"),
        ("", f"{summary.examples / summary.seconds:.1f} examples/s" if summary.seconds else "–"),
    ]


def histograms(scores: dict[str, list[float]]) -> str:
    """How the scores of examples spread, by their names."""
    drawn = {name: values for name, values in scores.items() if values}
    if not drawn:
        return ""
    rows = -(-len(drawn) // 3)
    figure, axes = plt.subplots(rows, 3, squeeze=False, figsize=(8, 2.4 * rows))
    for one in axes.flat[len(drawn) :]:
        one.remove()
    for (name, values), one in zip(drawn.items(), axes.flat, strict=False):
        # The few that are far off would make one bar of all others.
        most = float(np.percentile(values, 99)) if name == "perplexity" else None
        kept = [value for value in values if most is None or value <= most]
        is_share = name not in _OTHER_SCALES and min(kept) >= 0 and max(kept) <= 1
        one.hist(kept, bins=20, range=(0, 1) if is_share else None, color=BLUE)
        one.set(xlabel=name, ylabel="examples")
    return svg(figure)


def _shown(file: Path, summary: Summary) -> Shown:
    step = max(1, summary.examples // DRAWN)
    scores: dict[str, list[float]] = {name: [] for name in summary.estimates}
    worst = {
        name: _least(file, name, 1 if aggregate(name).higher_is_better else -1) for name in list(summary.estimates)[:1]
    }
    failed: list[dict[str, Any]] = []
    for number, example in enumerate(lines_of(file)):
        if example["error"] and len(failed) < WORST:
            failed.append(example)
        if number % step == 0:
            for name, values in scores.items():
                if name in example:
                    values.append(example[name])
    return Shown(scores, worst, failed)


def _least(file: Path, name: str, sign: int) -> list[dict[str, Any]]:
    scored = (example for example in lines_of(file) if name in example)
    return heapq.nsmallest(WORST, scored, key=lambda example: (sign * example[name], example["row"]))


def _scores(summary: Summary) -> str:
    if not summary.estimates:
        return "<p>No example has a score.</p>"
    heads = "".join(f"<th class=number>{head}</th>" for head in ("", "from", "to", "examples"))
    rows = "".join(row(cells) for cells in score_rows(summary))
    signature = f" BLEU: <code>{html.escape(summary.bleu_signature)}</code>" if summary.bleu_signature else ""
    return f"""{_interval_plot(summary.estimates)}
<table><tr><th></th>{heads}</tr>{rows}</table>
<p class=note>The intervals hold 95 % of what 1,000 sets of examples drawn from these give (bootstrap). An example that
failed counts in no score: {summary.failed} did. {summary.shield_violations} were not passed by the model's shields;
their answers are empty.{signature}</p>"""


def _interval_plot(estimates: dict[str, Estimate]) -> str:
    """The scores with their intervals; those of another scale have axes of their own."""
    groups = [[name for name in estimates if name not in _OTHER_SCALES]]
    groups += [[name] for name in estimates if name in _OTHER_SCALES]
    groups = [group for group in groups if group]
    heights = [len(group) + 1 for group in groups]
    figure, axes = plt.subplots(
        len(groups), squeeze=False, figsize=(8, 0.6 * sum(heights)), gridspec_kw={"height_ratios": heights}
    )
    for group, one in zip(groups, axes[:, 0], strict=True):
        _draw_intervals(one, {name: estimates[name] for name in group})
    return svg(figure)


def _draw_intervals(axes: Axes, estimates: dict[str, Estimate]) -> None:
    for place, one in enumerate(estimates.values()):
        axes.plot([one.low, one.high], [place, place], color=BLUE, linewidth=2)
        axes.plot([one.value], [place], "o", color=ORANGE)
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    if not set(estimates) & {*_OTHER_SCALES}:
        axes.set_xlim(0, 1)


def _worst(name: str, examples: Iterable[dict[str, Any]]) -> str:
    rows = "".join(
        texts_row([str(one["id"]), _number(one[name]), _cut(_said(one)), _cut(one["expected"]), _cut(one["answer"])])
        for one in examples
    )
    heads = "".join(f"<th>{head}</th>" for head in ("example", html.escape(name), "prompt", "reference", "answer"))
    return f"<h2>Worst examples by {html.escape(name)}</h2>\n<table><tr>{heads}</tr>{rows}</table>"


def _failed(summary: Summary, examples: list[dict[str, Any]]) -> str:
    if not examples:
        return ""
    rows = "".join(texts_row([str(one["id"]), _cut(_said(one)), _cut(one["error"])]) for one in examples)
    heads = "<th>example</th><th>prompt</th><th>error</th>"
    return f"<h2>Failed: {summary.failed}</h2>\n<table><tr>{heads}</tr>{rows}</table>"


def _said(example: dict[str, Any]) -> str:
    """The last message that the model was to answer."""
    content = example["messages"][-1]["content"] if example["messages"] else ""
    return content if isinstance(content, str) else json.dumps(content)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"
