"""The quickstart's report: one file that needs no other, with the scores and the plots of one run."""

import re
from pathlib import Path

import pytest

from scripts import report
from scripts.prompt_injection import Split
from scripts.quickstart import Results, fine_tuning

SCRIPT = "<script>alert(1)</script>"


def results() -> Results:
    split = Split(Path("rows.jsonl"), 240, 0.625, 3)
    training = [{"name": "loss", "step": step, "value": 1 / step} for step in range(1, 5)]
    validation = [{"name": "validation_loss", "step": step, "value": 2 / step} for step in (2, 4)]
    return Results(
        started_at=f"2030-01-01 {SCRIPT}",
        splits={"train": split, "validation": split, "test": split, "other_test": split},
        before={"em": 0.125, "f1": 0.25},
        after={
            "em": 0.875, "f1": 0.9375, "examples": 240, "seconds": 10, "prompt_tokens": 900, "completion_tokens": 100,
        },
        other={"em": 0.75, "f1": 0.8},
        training={"seconds": 61, "tokens_per_second": 432},
        series=training + validation,
        fine_tuning=fine_tuning("tune", "train", "validation"),
        tuned_model=f"small:{SCRIPT}",
        answers=[(f"text {SCRIPT}", f"base {SCRIPT}", "injection & more")],
        seconds=90,
    )  # fmt: skip


@pytest.fixture
def document(tmp_path: Path) -> str:
    file = tmp_path / "a folder" / "report.html"
    report.write(file, results())
    assert list(file.parent.iterdir()) == [file]
    return file.read_text(encoding="utf-8")


def test_nothing_is_fetched(document: str) -> None:
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", document)
    assert not re.search(r"https?://|//\w+\.|@import|<link|<img|<script|\bsrc\s*=", without_namespaces)
    # What refers to something refers to a part of the same file.
    assert set(re.findall(r"url\((.)", document)) <= {"#"}
    assert set(re.findall(r'href="(.)', document)) <= {"#"}


@pytest.mark.parametrize(
    "cells",
    [
        ("exact match, S-Labs test (240 rows)", "0.125", "0.875", "+0.750"),
        ("F1", "0.250", "0.938", "+0.688"),
        ("always the commonest label", "–", "0.625", ""),
        ("exact match, neuralchemy (240 rows)", "–", "0.750", ""),
        ("training time", "61 s"),
        ("training speed", "432 tokens/s"),
        ("evaluation speed", "100 tokens/s"),
        ("", "24.0 examples/s"),
        ("the whole run", "1.5 min"),
    ],
)
def test_scores_and_figures(document: str, cells: tuple[str, ...]) -> None:
    label, *numbers = cells
    assert f"<tr><td>{label}</td>{''.join(f'<td class=number>{cell}</td>' for cell in numbers)}</tr>" in document


def test_the_plots_are_inside(document: str) -> None:
    assert document.count("<svg") == document.count("</svg>") == 2
    for words in ("step", "loss", "training", "validation", "exact match", "base model", "tuned model"):
        assert f"<!-- {words} -->" in document


def test_the_loss_curve_has_a_line_for_each_series() -> None:
    both = results()
    training_only = results()
    training_only.series = [point for point in both.series if point["name"] == "loss"]
    assert report.BLUE in report.loss_plot(both)
    assert report.ORANGE in report.loss_plot(both)
    assert report.BLUE in report.loss_plot(training_only)
    assert report.ORANGE not in report.loss_plot(training_only)


def test_text_is_escaped(document: str) -> None:
    assert "<script" not in document
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    for text in (f"2030-01-01 {escaped}", f"small:{escaped}", f"<td>text {escaped}</td><td>base {escaped}</td>"):
        assert text in document
    assert "<td>injection &amp; more</td>" in document
