"""The results of an evaluation: the examples in files, their sums, and the report."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from jobs import evaluation_report, evaluation_results, scores
from jobs.evaluation_results import Summary
from stack.api.evaluations import EvaluateQuestionAnsweringRequest, EvaluateTextGenerationRequest
from stack.evaluations import PARQUET_FILE
from tests.samples import evaluation

SCRIPT = "<script>alert(1)</script>"


def example(row: int, answer: str = "Paris", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(row=row, id=f"q{row}", expected="Paris", answer=answer, error="", shield_violation="")
    found |= dict(messages=[{"role": "user", "content": f"Which city? {SCRIPT}"}], started=float(row), ended=row + 0.5)
    found |= dict(prompt_tokens=7, completion_tokens=3) | changes
    if found["error"]:
        found |= dict(prompt_tokens=0, completion_tokens=0, started=None, ended=None)
    else:
        for score in scores.scorers(["em", "f1", "rouge", "bleu"]):
            found |= score(found["expected"], found["answer"])
        found |= scores.perplexity(2.0 * row, 2)
    return found


EXAMPLES = [
    example(1),
    example(2, "London"),
    example(3, error=f"too long {SCRIPT}", answer=""),
    example(4, "in Paris, of course"),
    example(5, "", shield_violation="no"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, EXAMPLES)


def written(folder: Path, examples: list[dict[str, Any]]) -> Path:
    file = folder / "examples.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in examples))
    return file


def text_generation() -> EvaluateTextGenerationRequest:
    body = evaluation("test", metrics=["rouge", "bleu", "perplexity"])
    return EvaluateTextGenerationRequest.model_validate(body)


def summary_of(file: Path) -> Summary:
    return evaluation_results.summarize(text_generation(), file, f"small:{SCRIPT}", "0" * 64, seconds=4.5)


def test_failed_examples_count_in_no_score_and_are_told(file: Path) -> None:
    request = EvaluateQuestionAnsweringRequest.model_validate(evaluation("test", metrics=["em", "f1"]))
    summary = evaluation_results.summarize(request, file, "small", "0" * 64, seconds=4.5)
    assert summary.estimates["em"].value == 1 / 4
    assert summary.estimates["em"].examples == 4
    figures = summary.figures()
    assert (figures["examples"], figures["failed"], figures["shield_violations"]) == (5.0, 1.0, 1.0)
    assert (figures["prompt_tokens"], figures["completion_tokens"], figures["seconds"]) == (28.0, 12.0, 4.5)
    assert figures["em_low"] <= figures["em"] <= figures["em_high"]
    assert "bleu_signature" not in summary.kept()


def test_a_summary_has_all_scores_of_its_metrics(file: Path) -> None:
    summary = summary_of(file)
    assert list(summary.estimates) == ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "perplexity"]
    assert summary.estimates["perplexity"].value == pytest.approx(2.718281828 ** ((1 + 2 + 4 + 5) / 4))
    assert summary.kept()["bleu_signature"].startswith("nrefs:1|case:mixed")
    assert summary.kept()["dataset_sha256"] == "0" * 64
    assert summary.kept()["scores"] == list(summary.estimates)


def test_the_scores_are_the_same_however_many_are_read_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summary_of(file)
    monkeypatch.setattr(evaluation_results, "BATCH_ROWS", 2)
    assert summary_of(file) == whole


def test_where_all_examples_failed_there_is_no_score(tmp_path: Path) -> None:
    file = written(tmp_path, [example(1, error="away", answer="")])
    summary = summary_of(file)
    assert summary.estimates == {}
    assert summary.figures()["failed"] == 1
    evaluation_report.write(tmp_path / "report.html", file, summary)
    assert "No example has a score" in (tmp_path / "report.html").read_text()


def test_the_rows_are_parquet_too_and_failed_ones_have_no_scores(file: Path) -> None:
    evaluation_results.write_parquet(file, ["rouge", "bleu", "perplexity"])
    rows = pyarrow.parquet.read_table(file.with_name(PARQUET_FILE)).to_pylist()
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5]
    for row, wanted in zip(rows, EXAMPLES, strict=True):
        for name in ("id", "messages", "expected", "answer", "error", "shield_violation", "started", "ended"):
            assert row[name] == wanted[name]
        for name in scores.columns(["rouge", "bleu", "perplexity"]):
            assert row[name] == wanted.get(name)
    assert rows[2]["bleu"] is None


def test_half_a_character_does_not_keep_rows_from_being_parquet_and_in_the_report(tmp_path: Path) -> None:
    file = written(tmp_path, [example(1, "half \ud83d")])
    evaluation_results.write_parquet(file, ["bleu"])
    assert pyarrow.parquet.read_table(file.with_name(PARQUET_FILE)).to_pylist()[0]["answer"] == "half ?"
    evaluation_report.write(tmp_path / "report.html", file, summary_of(file))
    assert "half ?" in (tmp_path / "report.html").read_text()


@pytest.fixture
def document(file: Path) -> str:
    report = file.with_name("report.html")
    evaluation_report.write(report, file, summary_of(file))
    return report.read_text(encoding="utf-8")


def test_the_report_fetches_nothing(document: str) -> None:
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", document)
    assert not re.search(r"https?://|//\w+\.|@import|<link|<img|<script|\bsrc\s*=", without_namespaces)


def test_the_report_has_scores_with_intervals_histograms_and_the_signature(document: str, file: Path) -> None:
    assert document.count("<svg") == document.count("</svg>") == 2
    summary = summary_of(file)
    for name, value, low, high, examples in evaluation_report.score_rows(summary):
        cells = "".join(f"<td class=number>{cell}</td>" for cell in (value, low, high, examples))
        assert f"<tr><td>{name}</td>{cells}</tr>" in document
        assert f"<!-- {name} -->" in document
    assert summary.bleu_signature in document
    assert "<tr><td>prompt tokens</td><td class=number>28</td></tr>" in document
    assert "<tr><td>time</td><td class=number>4.5 s</td></tr>" in document


def test_the_report_shows_the_worst_examples_first_and_those_that_failed(document: str) -> None:
    assert "Worst examples by rouge1" in document
    worst, failed = document.split("Worst examples by rouge1")[1].split("Failed: 1")
    assert re.findall(r"<td>(q\d)</td>", worst) == ["q2", "q5", "q4", "q1"]
    assert re.findall(r"<td>(q\d)</td>", failed) == ["q3"]


def test_texts_in_the_report_are_escaped(document: str) -> None:
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    for text in (f"small:{escaped}", f"Which city? {escaped}", f"too long {escaped}"):
        assert text in document


def test_of_perplexity_the_highest_is_the_worst(file: Path) -> None:
    request = EvaluateTextGenerationRequest.model_validate(evaluation("test", metrics=["perplexity"]))
    report = file.with_name("report.html")
    evaluation_report.write(report, file, evaluation_results.summarize(request, file, "small", "0" * 64, 4.5))
    worst = report.read_text().split("Worst examples by perplexity")[1].split("Failed")[0]
    assert re.findall(r"<td>(q\d)</td>", worst) == ["q5", "q4", "q2", "q1"]
