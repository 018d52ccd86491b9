"""The quickstart's report: one HTML file with its plots inside."""

import html
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt

from jobs.report import BLUE, GREY, ORANGE, row, svg, texts_row, write_page

if TYPE_CHECKING:
    from scripts.quickstart import Results


def score_rows(results: "Results") -> list[tuple[str, float | None, float]]:
    """(label, before, after) of every score. What was not measured before the tuning is None."""
    test, other = results.splits["test"], results.splits["other_test"]
    return [
        (f"exact match, S-Labs test ({test.rows} rows)", results.before["em"], results.after["em"]),
        ("F1", results.before["f1"], results.after["f1"]),
        ("always the commonest label", None, test.commonest_share),
        (f"exact match, neuralchemy ({other.rows} rows)", None, results.other["em"]),
        ("always the commonest label", None, other.commonest_share),
    ]


def figure_rows(results: "Results") -> list[tuple[str, str]]:
    """(label, value) of everything that is not a score."""
    training, after = results.training, results.after
    tokens = after["prompt_tokens"] + after["completion_tokens"]
    return [
        ("training time", f"{training['seconds']:.0f} s"),
        ("training speed", f"{training['tokens_per_second']:.0f} tokens/s"),
        ("evaluation speed", f"{tokens / after['seconds']:.0f} tokens/s"),
        ("", f"{after['examples'] / after['seconds']:.1f} examples/s"),
    ]


def write(file: Path, results: "Results") -> None:
    """Writes the report."""
    config = results.fine_tuning
    lora, optimizer, training = config["algorithm_config"], config["optimizer_config"], config["training_config"]
    train = results.splits["train"]
    scores = "".join(
        row([label, score(before), score(after), "" if before is None else f"{after - before:+.3f}"])
        for label, before, after in score_rows(results)
    )
    figures = "".join(
        row(list(pair)) for pair in [*figure_rows(results), ("the whole run", f"{results.seconds / 60:.1f} min")]
    )
    answers = "".join(texts_row(texts) for texts in results.answers)
    dropped = sum(results.splits[name].dropped for name in ("test", "other_test"))
    body = f"""<h1>A small model learns to detect prompt injections</h1>
<p class=note>{html.escape(results.started_at)} · {html.escape(platform.machine())}, {os.cpu_count()} CPUs ·
model <code>{html.escape(config["model"])}</code> · tuned model <code>{html.escape(results.tuned_model)}</code></p>
<h2>Scores</h2>
<table>
<tr><th></th><th class=number>before</th><th class=number>after</th><th class=number>gain</th></tr>
{scores}</table>
<p class=note>The test rows were used for nothing but these scores; {dropped} others stood in an earlier split
as well and were left out. The neuralchemy set comes from other authors and was never trained on.</p>
{score_plot(results)}
<h2>Training</h2>
{loss_plot(results)}
<p>{train.rows} rows, {training["n_epochs"]} epoch, batches of {training["batch_size"]}; LoRA of rank {lora["rank"]}
and alpha {lora["alpha"]} on all linear layers; {optimizer["optimizer_type"]}, learning rate {optimizer["lr"]} along a
cosine; loss on the answer's tokens only.</p>
<table>{figures}</table>
<h2>Answers</h2>
<table><tr><th>text</th><th>base model</th><th>tuned model</th></tr>{answers}</table>"""
    write_page(file, f"Quickstart {results.started_at}", body)


def score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def loss_plot(results: "Results") -> str:
    """Training and validation loss over the steps."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for name, label, style in (
        ("loss", "training", f"{BLUE} -"),
        ("validation_loss", "validation", f"{ORANGE} o-"),
    ):
        points = [(point["step"], point["value"]) for point in results.series if point["name"] == name]
        if points:
            color, line = style.split()
            axes.plot(*zip(*points, strict=True), line, color=color, label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    return svg(figure)


def score_plot(results: "Results") -> str:
    """Exact match before and after, beside what always answering the commonest label scores."""
    test, other = results.splits["test"], results.splits["other_test"]
    bars = [
        ("base model", results.before["em"], BLUE),
        ("tuned model", results.after["em"], ORANGE),
        ("commonest label", test.commonest_share, GREY),
        ("tuned model,\nneuralchemy", results.other["em"], ORANGE),
        ("commonest label,\nneuralchemy", other.commonest_share, GREY),
    ]
    figure, axes = plt.subplots(figsize=(8, 2.8))
    drawn = axes.bar([name for name, *_ in bars], [value for _, value, _ in bars], color=[color for *_, color in bars])
    axes.bar_label(drawn, fmt="%.3f", padding=2)
    axes.set(ylabel="exact match", ylim=(0, 1.1))
    return svg(figure)
