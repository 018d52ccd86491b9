"""The report of a benchmark: its scores with their intervals, by lm-eval's standard errors."""

import html
from pathlib import Path

from matplotlib import pyplot as plt

from jobs.report import BLUE, ORANGE, row, svg, write_page

# An interval of 95 % of a mean that is spread normally, in standard errors.
WIDTH = 1.96
_STDERR = "_stderr"
Score = tuple[str, float, float | None]


def write(file: Path, model: str, figures: dict[str, float]) -> None:
    """Writes the report of scores by `task/metric`, with their standard errors as `task/metric_stderr`."""
    scores = [(name, value, figures.get(_stderr_of(name))) for name, value in figures.items() if _STDERR not in name]
    heads = "".join(f"<th class=number>{head}</th>" for head in ("", "from", "to"))
    body = f"""<h1>Benchmark</h1>
<p class=note>model <code>{html.escape(model)}</code></p>
<h2>Scores</h2>
{_plot(scores)}
<table><tr><th></th>{heads}</tr>{"".join(row(_cells(*score)) for score in scores)}</table>
<p class=note>The ends are those of a 95 % interval, {WIDTH} of lm-eval's standard errors to each side, where it has
one. What was asked and answered stands in the files of samples.</p>"""
    write_page(file, f"Benchmark of {model}", body)


def _stderr_of(name: str) -> str:
    """The name of a score's standard error, which stands before that of the filter of its answers."""
    metric, comma, filtered = name.partition(",")
    return f"{metric}{_STDERR}{comma}{filtered}"


def _cells(name: str, value: float, stderr: float | None) -> list[str]:
    ends = ["–", "–"] if stderr is None else [f"{value - WIDTH * stderr:.4g}", f"{value + WIDTH * stderr:.4g}"]
    return [name, f"{value:.4g}", *ends]


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
